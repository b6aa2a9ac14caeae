"""`RWKVTrainingPipeline`: a run from Python, in this process, by the same calls as the command line."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_cluster.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    Section,
    TrainingConfig,
)
from rwkv_cluster.config.loader import dump_json, dump_yaml, load_config
from rwkv_cluster.config.recipes import require_built_in
from rwkv_cluster.data.converters import DataPipeline
from rwkv_cluster.data.inputs.readers import as_array
from rwkv_cluster.data.inputs.sources import source_at
from rwkv_cluster.data.preparation.prepare import DataManifest, load_manifest
from rwkv_cluster.data.sampler import largest_magic_prime
from rwkv_cluster.errors import CheckpointError, ConfigError, DataError, MissingCheckpointError, MissingDataError
from rwkv_cluster.runtime.paths import written_out
from rwkv_cluster.runtime.rank_env import rank
from rwkv_cluster.runtime.terminal.console import log_to_stderr_by_default
from rwkv_cluster.runtime.terminal.nearest import suggestion
from rwkv_cluster.tokenizer import (
    GenericTokenizer,
    IntegerTokenizer,
    as_tokenizer,
    build_tokenizer,
    describe_tokenizer,
    saved_name,
    tokenizer_identity,
)
from rwkv_cluster.train.foreign_files import require_no_foreign_files
from rwkv_cluster.workdir import WorkDir, atomic_write

if TYPE_CHECKING:
    from rwkv_cluster.train.run import TrainResult

log = logging.getLogger("rwkv_cluster")


class _SectionOf:
    """A pipeline's attribute that holds one section: a section of its kind, or its fields in a mapping, may be set."""

    def __init__(self, kind: type[Section]) -> None:
        self._kind = kind

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, pipeline: Any, owner: type) -> Any:
        return vars(pipeline)[self._name]

    def __set__(self, pipeline: Any, value: Any) -> None:
        if isinstance(value, Mapping):
            value = self._kind(**value)
        if not isinstance(value, self._kind):
            kind = self._kind.__name__
            raise ConfigError(f"{self._name} is {value!r:.80}, expected a {kind}", remedy=f"Write {kind}(...)")
        vars(pipeline)[self._name] = value.thawed() if value.is_frozen else value


class RWKVTrainingPipeline:
    """One run in `work_dir`: prepare data, train, continue, inspect.

    work_dir: made if needed. What is not given here is read from the configuration that is stored there; making a
        pipeline never changes that file.
    model_config, training_config, data_config, checkpoint_config, logging_config: sections of the configuration, or
        mappings of their fields. In a given model_config the vocab_size becomes the tokenizer's.
    tokenizer: any object with encode, decode and vocab_size, or the name of a built-in one. Default: the stored one,
        unless that is a class beside the built-in ones, whose module is not imported on a stored file's word; else
        IntegerTokenizer(359).
    wandb_project: also log to this Weights & Biases project.

    Settings may be changed between calls: `pipeline.training_config.lr_init = 1e-4`, or a whole section at once.
    What a run is doing is said on stderr, unless logging is set up, for `rwkv_cluster` or as a whole.
    Under torchrun every rank makes the same calls; rank 0 prepares data and writes files.
    """

    model_config = _SectionOf(ModelConfig)
    training_config = _SectionOf(TrainingConfig)
    data_config = _SectionOf(DataConfig)
    checkpoint_config = _SectionOf(CheckpointConfig)
    logging_config = _SectionOf(LoggingConfig)

    def __init__(
        self,
        work_dir: str | Path,
        model_config: ModelConfig | Mapping[str, Any] | None = None,
        training_config: TrainingConfig | Mapping[str, Any] | None = None,
        data_config: DataConfig | Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        wandb_project: str | None = None,
        *,
        checkpoint_config: CheckpointConfig | Mapping[str, Any] | None = None,
        logging_config: LoggingConfig | Mapping[str, Any] | None = None,
    ) -> None:
        self._paths = WorkDir(work_dir)
        self._paths.create()
        stored = self._stored_config()
        fallback = stored or Config(logging=LoggingConfig(sample_tokens=0))
        self.model_config = fallback.model.thawed() if model_config is None else model_config
        self.training_config = fallback.training.thawed() if training_config is None else training_config
        self.data_config = fallback.data.thawed() if data_config is None else data_config
        self.checkpoint_config = fallback.checkpoint.thawed() if checkpoint_config is None else checkpoint_config
        self.logging_config = fallback.logging.thawed() if logging_config is None else logging_config
        self.wandb_project = wandb_project or self.logging_config.wandb_project
        given_data = None if data_config is None else self.data_config
        self._tokenizer = _first_tokenizer(tokenizer, given_data, stored, self._paths.config_yaml)
        self.manifest: DataManifest | None = None
        self._exit_tokens: int | None = None
        starts_from_weights = self.training_config.init_from is not None  # whose rows they then are
        if not starts_from_weights and (model_config is not None or self.model_config.vocab_size is None):
            self.model_config.vocab_size = int(self.tokenizer.vocab_size)
        if stored is None:
            if rank() == 0:
                require_no_foreign_files(self._paths, None, self.training_config.init_from)
            self._write_config()

    @property
    def config(self) -> Config:
        """The whole configuration as it stands."""
        return Config(
            work_dir=str(self.work_dir),
            model=self.model_config,
            data=_changed(self.data_config, tokenizer=describe_tokenizer(self.tokenizer)),
            training=self.training_config,
            checkpoint=self.checkpoint_config,
            logging=_changed(self.logging_config, wandb_project=self.wandb_project),
        )

    @property
    def work_dir(self) -> Path:
        """The run's one directory; another one is another pipeline."""
        return self._paths.root

    @property
    def data_dir(self) -> Path:
        """Token files, vocabulary and manifest."""
        return self._paths.data

    @property
    def output_dir(self) -> Path:
        """Weights and checkpoints."""
        return self._paths.out

    @property
    def config_dir(self) -> Path:
        """The configuration that the last run used."""
        return self._paths.configs

    @property
    def tokenizer(self) -> Any:
        """Text to ids. Setting another one also sets model_config.vocab_size."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        tokenizer = as_tokenizer(tokenizer)
        if tokenizer_identity(tokenizer) != tokenizer_identity(self._tokenizer):
            self.model_config.vocab_size = int(tokenizer.vocab_size)
        self._tokenizer = tokenizer

    @property
    def data_pipeline(self) -> DataPipeline:
        """The converters with this run's tokenizer, for preparing data by hand. Setting one sets its tokenizer."""
        return DataPipeline(self.tokenizer)

    @data_pipeline.setter
    def data_pipeline(self, data_pipeline: DataPipeline) -> None:
        self.tokenizer = data_pipeline.tokenizer

    @property
    def data_prepared(self) -> bool:
        """Whether this object has prepared its data, or found it prepared. Setting it looks, or forgets."""
        return self.manifest is not None

    @data_prepared.setter
    def data_prepared(self, is_prepared: bool) -> None:
        self.manifest = self.manifest if is_prepared else None
        if is_prepared:
            self._require_data("data_prepared is set")

    @property
    def model_initialized(self) -> bool:
        """Whether out/rwkv-init.pth is there. It cannot be set where it is not so."""
        return self._paths.initial_weights.exists()

    @model_initialized.setter
    def model_initialized(self, is_initialized: bool) -> None:
        if is_initialized and not self.model_initialized:
            path = self._paths.initial_weights
            raise MissingCheckpointError(
                f"model_initialized is set, but there is no {path}", remedy="Call initialize_model()"
            )

    @property
    def data_prefix(self) -> Path | None:
        """The token file's path without its suffix. Setting it is `use_existing_data`."""
        return self.manifest.token_prefix(self.data_dir) if self.manifest else None

    @data_prefix.setter
    def data_prefix(self, prefix: str | Path) -> None:
        self.use_existing_data(prefix, None, self._exit_tokens)

    @property
    def my_exit_tokens(self) -> int | None:
        """Tokens of one pass over the prepared data, or what `use_existing_data` was told."""
        if self._exit_tokens is not None:
            return self._exit_tokens
        return self.manifest.n_tokens if self.manifest else None

    @my_exit_tokens.setter
    def my_exit_tokens(self, n_tokens: int | None) -> None:
        self._exit_tokens = n_tokens

    @property
    def magic_prime(self) -> int | None:
        """The sampler's prime for the prepared data and model_config.ctx_len; None when the data is too small.

        It follows from these two: another one may be set, and is told not to be used.
        """
        return largest_magic_prime(self.manifest.n_tokens, self.model_config.ctx_len) if self.manifest else None

    @magic_prime.setter
    def magic_prime(self, magic_prime: int | None) -> None:
        if magic_prime is not None and magic_prime != self.magic_prime:
            log.warning(
                "magic_prime %s is not used: for ctx_len %d this data has %s",
                magic_prime,
                self.model_config.ctx_len,
                self.magic_prime,
            )

    @log_to_stderr_by_default()
    def prepare_data(self, data: np.ndarray, data_name: str = "train") -> dict[str, Any]:
        """Prepare an integer array: 1-D is cut into documents of data_config.sequence_length, 2-D has one a row.

        Raises DataError for values that the tokenizer does not know.
        """
        return self._prepare([as_array(data, "the data")], [], data_name)

    @log_to_stderr_by_default()
    def prepare_data_from_file(self, file_path: str | Path, data_name: str = "train") -> dict[str, Any]:
        """Prepare a .npy file, or any other input that data.inputs takes."""
        return self._prepare([], [_existing(file_path, "Data file")], data_name)

    @log_to_stderr_by_default()
    def prepare_data_from_jsonl(
        self,
        jsonl_path: str | Path,
        data_name: str = "train",
        n_epochs: int | None = None,
        vocab_file_path: str | Path | None = None,
    ) -> dict[str, Any]:
        """Prepare JSONL lines, whatever the file's name.

        n_epochs: copies of every document, default data_config.n_epochs_duplication. vocab_file_path: use a
        GenericTokenizer of that vocabulary from here on.
        """
        path = _existing(jsonl_path, "JSONL file")
        if vocab_file_path is not None:
            self.tokenizer = GenericTokenizer(written_out(vocab_file_path, "vocab_file_path"))
        if n_epochs is not None:
            self.data_config = _changed(self.data_config, n_epochs_duplication=n_epochs)
        return self._prepare([], [self._named_as_jsonl(path, data_name)], data_name)

    @log_to_stderr_by_default()
    def use_existing_data(self, binidx_prefix: str | Path, magic_prime: int | None, exit_tokens: int | None) -> None:
        """Train on a .bin/.idx pair as it is.

        magic_prime: only compared; the one that is used follows from the data and ctx_len. exit_tokens: where a run
        ends that has no other bound.
        """
        prefix = written_out(binidx_prefix, "binidx_prefix")
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").exists():
                raise MissingDataError(f"{suffix[1:].title()} file not found: {prefix}{suffix}")
        self._prepare([], [str(Path(f"{prefix}.bin").absolute())], "train")
        self._exit_tokens = exit_tokens
        self.magic_prime = magic_prime

    @log_to_stderr_by_default()
    def initialize_model(self, force: bool = False, random_seed: int = -1) -> Path:
        """Write out/rwkv-init.pth unless a fitting one is there; `force` replaces it. Returns its path."""
        from rwkv_cluster.train.run import initialize

        self._require_data("Data must be prepared before model initialization")
        self._set_training(random_seed=None if random_seed == -1 else random_seed)
        return initialize(self.config, force=force, tokenizer=self.tokenizer)

    @log_to_stderr_by_default()
    def train(
        self,
        data: np.ndarray | None = None,
        num_epochs: int | None = None,
        continue_training: bool = False,
        random_seed: int = -1,
    ) -> TrainResult:
        """Train to the end, or continue where the last call ended.

        data: prepared first, as by `prepare_data`; None: what is prepared. num_epochs: passes over the token file;
        default training_config's bounds, or one. continue_training: refuse to start from the beginning.
        random_seed: of the initial weights; -1: training_config's.
        """
        from rwkv_cluster.train.checkpoint.save_load import list_steps
        from rwkv_cluster.train.run import train

        if data is not None:
            self.prepare_data(data)
        self._require_data("Either provide data or call prepare_data() first")
        if continue_training and not list_steps(self._paths.checkpoints):
            raise MissingCheckpointError(
                f"continue_training is set, but {self._paths.checkpoints} has no checkpoint",
                remedy="Call train() without it",
            )
        self._set_training(num_epochs=num_epochs, random_seed=None if random_seed == -1 else random_seed)
        bounds = (self.training_config.num_epochs, self.training_config.max_steps, self.training_config.max_tokens)
        if bounds == (None, None, None):
            self._set_training(max_tokens=self._exit_tokens)
        return train(self.config, tokenizer=self.tokenizer, manifest=self.manifest)

    @log_to_stderr_by_default()
    def train_from_checkpoint(
        self,
        checkpoint_path: str | Path,
        num_epochs: int | None = None,
        auto_detect: bool = True,
        override_config: Mapping[str, Any] | None = None,
    ) -> TrainResult:
        """Start a new run from weights, a file or a folder; called again, continue that run.

        auto_detect: take the architecture from the file. override_config: fields of ModelConfig or TrainingConfig to
        set after that, ctx_len or lr_init for instance.

        Raises:
            CheckpointError: the file is no RWKV model, has fewer vocabulary rows than the tokenizer has ids, or
                does not fit model_config.
            ConfigError: an override is unknown, or the work directory holds a run that started otherwise.
        """
        from rwkv_cluster.interchange.read import peek_weights
        from rwkv_cluster.model.weights_file import infer_model_config

        self._require_data("Data must be prepared before training")
        path = Path(written_out(checkpoint_path, "checkpoint_path"))
        if not path.exists():
            raise MissingCheckpointError(f"Checkpoint not found: {path}")
        overrides = _by_section(override_config or {})
        model = self.model_config
        if auto_detect:
            model = _changed(infer_model_config(peek_weights(path).tensors), ctx_len=model.ctx_len)
            if overrides[TrainingConfig].get("new_rows", self.training_config.new_rows) is None:
                self._require_rows(path, model.vocab_size or 0)
            else:
                model = _changed(model, vocab_size=max(model.vocab_size or 0, int(self.tokenizer.vocab_size)))
        self.model_config = _changed(model, **overrides[ModelConfig])
        self._set_training(init_from=str(path.absolute()), **overrides[TrainingConfig])
        return self.train(num_epochs=num_epochs)

    def inspect_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Architecture and size of a weights file or folder, see `inspect_rwkv_checkpoint`."""
        from rwkv_cluster.interchange.checkpoint_info import inspect_rwkv_checkpoint

        return inspect_rwkv_checkpoint(path)

    def list_checkpoints(self) -> list[Path]:
        """The weights files in out/, in the order of training: init, epochs by number, final."""
        ranked = [(rank, path) for path in self.output_dir.glob("rwkv-*.pth") if (rank := _rank_of(path)) is not None]
        return [path for _, path in sorted(ranked)]

    def get_latest_checkpoint(self) -> Path | None:
        """The furthest trained weights file in out/; None before the first epoch's end."""
        trained = [path for path in self.list_checkpoints() if path != self._paths.initial_weights]
        return trained[-1] if trained else None

    def _prepare(self, arrays: Sequence[np.ndarray], inputs: Sequence[str], data_name: str) -> dict[str, Any]:
        from rwkv_cluster.train.checkpoint.save_load import list_steps
        from rwkv_cluster.train.run import prepare_data

        self.data_config = _changed(self.data_config, inputs=list(inputs))
        self._exit_tokens = None
        self.manifest = prepare_data(self.config, tokenizer=self.tokenizer, arrays=arrays, name=data_name)
        if not list_steps(self._paths.checkpoints):  # else the file describes the run that they belong to
            self._write_config()
        jsonl = self.data_dir / f"{data_name}.jsonl"
        return {
            "jsonl_path": jsonl if jsonl.exists() or not inputs else Path(inputs[0]),
            "binidx_prefix": self.data_prefix,
            "vocab_path": self.data_dir / saved_name(self.tokenizer),
            "num_sequences": self.manifest.n_documents,
            "total_tokens": self.manifest.n_tokens,
            "magic_prime": self.magic_prime,
        }

    def _named_as_jsonl(self, path: str, data_name: str) -> str:
        """`path`, or a link to it whose name says that it holds JSONL."""
        source = source_at(Path(path))
        if source.kind == "jsonl":
            return path
        link = self.data_dir / f"{data_name}.jsonl{Path(path).suffix if source.compression else ''}"
        temporary = link.with_name(f"{link.name}.{os.getpid()}")  # each rank makes the same link, by rename
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(path)
        os.replace(temporary, link)
        return str(link)

    def _require_data(self, message: str) -> None:
        if self.manifest is None:
            try:
                self.manifest = load_manifest(self.data_dir)
            except DataError as error:
                raise DataError(error.what, where=message, remedy=error.remedy) from error

    def _require_rows(self, path: Path, n_rows: int) -> None:
        needed = int(self.tokenizer.vocab_size)
        if n_rows < needed:
            raise CheckpointError(
                f"Vocab size mismatch: {path} has {n_rows} rows, the tokenizer has {needed} ids",
                remedy="Use the tokenizer that the file was trained with",
            )
        if n_rows > needed:
            log.warning("%s has %d vocabulary rows, of which the tokenizer uses %d", path, n_rows, needed)

    def _set_training(self, **changes: Any) -> None:
        """Change what is not None."""
        given = {name: value for name, value in changes.items() if value is not None}
        if given:
            self.training_config = _changed(self.training_config, **given)

    def _stored_config(self) -> Config | None:
        if (self._paths.config_yaml).exists():
            return load_config(self._paths.config_yaml)
        if (self._paths.config_json).exists():
            raise ConfigError(
                f"work_dir {self.work_dir} was made by another program: it has configs/config.json, but no "
                "configs/config.yaml",
                remedy="Choose another work_dir; train_from_checkpoint can start from its weights",
            )
        return None

    def _write_config(self) -> None:
        if rank() == 0:
            atomic_write(self._paths.config_yaml, dump_yaml(self.config).encode())
            atomic_write(self._paths.config_json, dump_json(self.config).encode())


def _first_tokenizer(given: Any, data_config: DataConfig | None, stored: Config | None, path: Path) -> Any:
    if given is not None:
        return as_tokenizer(given)
    if data_config is not None and data_config.tokenizer.model_fields_set:
        return build_tokenizer(data_config.tokenizer)
    if stored is None:
        return IntegerTokenizer(max_value=359)
    chosen = stored.data.tokenizer
    require_built_in(chosen, path, "tokenizer=...")
    try:
        return build_tokenizer(chosen)
    except (DataError, ConfigError) as error:
        raise ConfigError(
            f"the tokenizer of this work_dir, {chosen.type}, cannot be made again: {error}",
            remedy="Give it as tokenizer=...",
        ) from error


def _changed(section: Any, **changes: Any) -> Any:
    """A validated copy of a section with other values. Raises ConfigError for a name or value that it does not take."""
    return section.__replace__(**changes)


def _by_section(overrides: Mapping[str, Any]) -> dict[type, dict[str, Any]]:
    """Overrides by the section that has a field of that name. Raises ConfigError for a name that none has."""
    sections: tuple[type[ModelConfig] | type[TrainingConfig], ...] = (ModelConfig, TrainingConfig)
    names = [name for section in sections for name in section.model_fields]
    for name in overrides:
        if name not in names:
            nearest = suggestion(name, names, "Fields")
            raise ConfigError(
                f"override_config has '{name}', no field of ModelConfig or TrainingConfig", remedy=nearest
            )
    return {
        section: {name: value for name, value in overrides.items() if name in section.model_fields}
        for section in sections
    }


def _existing(path: str | Path, what: str) -> str:
    path = written_out(path, what)
    if not Path(path).exists():
        raise MissingDataError(f"{what} not found: {path}")
    return str(Path(path).absolute())


def _rank_of(path: Path) -> float | None:
    label = path.stem.removeprefix("rwkv-")
    named = {"init": -1.0, "final": float("inf")}
    return named.get(label, float(label) if label.isdigit() else None)
