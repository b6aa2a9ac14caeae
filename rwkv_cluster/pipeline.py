"""`RWKVTrainingPipeline`: a run from Python, in this process, by the same calls as the command line."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rwkv_cluster.config import Config, DataConfig, LoggingConfig, ModelConfig, TrainingConfig
from rwkv_cluster.configfile import dump_json, dump_yaml, load_config
from rwkv_cluster.data.converters import DataPipeline
from rwkv_cluster.data.prepare import DataManifest, load_manifest
from rwkv_cluster.data.sampler import largest_magic_prime
from rwkv_cluster.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MissingCheckpointError,
    MissingDataError,
)
from rwkv_cluster.tokenizer import GenericTokenizer, IntegerTokenizer
from rwkv_cluster.workdir import WorkDir, atomic_write

log = logging.getLogger("rwkv_cluster")


class RWKVTrainingPipeline:
    """One run in `work_dir`: prepare data, train, continue, inspect.

    work_dir: made if needed. An existing one keeps its configuration, and what is not given here is read from it.
    model_config, training_config, data_config: sections of the configuration; model_config.vocab_size is always the
        tokenizer's.
    tokenizer: any object with encode, decode and vocab_size; default IntegerTokenizer(max_value=359).
    wandb_project: also log to this Weights & Biases project.

    Under torchrun every rank makes the same calls; rank 0 prepares data and writes files.
    """

    def __init__(
        self,
        work_dir: str | Path,
        model_config: ModelConfig | None = None,
        training_config: TrainingConfig | None = None,
        data_config: DataConfig | None = None,
        tokenizer: Any = None,
        wandb_project: str | None = None,
    ) -> None:
        self._paths = WorkDir(Path(work_dir).resolve())
        self._paths.create()
        stored = self._stored_config()
        self.work_dir = self._paths.root
        self.data_dir = self._paths.data
        self.output_dir = self._paths.out
        self.config_dir = self._paths.configs
        self.training_config = training_config or stored.training
        self.data_config = data_config or stored.data
        self.wandb_project = wandb_project or stored.logging.wandb_project
        self._logging_config = stored.logging
        self._checkpoint_config = stored.checkpoint
        self._wanted_model = model_config or stored.model
        self.manifest: DataManifest | None = None
        self.data_pipeline = DataPipeline(tokenizer)
        self._set_tokenizer(tokenizer if tokenizer is not None else IntegerTokenizer(max_value=359))
        self._exit_tokens: int | None = None
        if not (self.config_dir / "config.json").exists():
            self._write_config()

    @property
    def config(self) -> Config:
        """The whole configuration as it stands."""
        return Config(
            work_dir=str(self.work_dir),
            model=self.model_config,
            data=self.data_config,
            training=self.training_config,
            checkpoint=self._checkpoint_config,
            logging=self._logging_config.model_copy(update={"wandb_project": self.wandb_project}),
        )

    @property
    def data_prepared(self) -> bool:
        return self.manifest is not None

    @property
    def model_initialized(self) -> bool:
        return (self.output_dir / "rwkv-init.pth").exists()

    @property
    def data_prefix(self) -> Path | None:
        """The token file's path without its suffix."""
        return self.data_dir / self.manifest.prefix if self.manifest else None

    @property
    def my_exit_tokens(self) -> int | None:
        """Tokens of one pass over the prepared data."""
        if self._exit_tokens is not None:
            return self._exit_tokens
        return self.manifest.n_tokens if self.manifest else None

    @property
    def magic_prime(self) -> int | None:
        """The sampler's prime for the prepared data and model_config.ctx_len; None when the data is too small."""
        return largest_magic_prime(self.manifest.n_tokens, self.model_config.ctx_len) if self.manifest else None

    def prepare_data(self, data: np.ndarray, data_name: str = "train") -> dict[str, Any]:
        """Prepare an integer array: 1-D is cut into documents of data_config.sequence_length, 2-D has one a row.

        Raises DataError for values that the tokenizer does not know.
        """
        return self._prepare([np.asarray(data)], [], data_name)

    def prepare_data_from_file(self, file_path: str | Path, data_name: str = "train") -> dict[str, Any]:
        """Prepare a .npy file, or any other input that data.inputs takes."""
        return self._prepare([], [_existing(file_path, "Data file")], data_name)

    def prepare_data_from_jsonl(
        self,
        jsonl_path: str | Path,
        data_name: str = "train",
        n_epochs: int | None = None,
        vocab_file_path: str | Path | None = None,
    ) -> dict[str, Any]:
        """Prepare JSONL lines. vocab_file_path: use a GenericTokenizer of that vocabulary from here on."""
        path = _existing(jsonl_path, "JSONL file")
        if vocab_file_path is not None:
            self._set_tokenizer(GenericTokenizer(str(vocab_file_path)))
        if n_epochs is not None:
            self.data_config = _changed(self.data_config, n_epochs_duplication=n_epochs)
        return self._prepare([], [path], data_name)

    def use_existing_data(self, binidx_prefix: str | Path, magic_prime: int | None, exit_tokens: int | None) -> None:
        """Train on a .bin/.idx pair as it is.

        magic_prime: only compared; the one that is used follows from the data and ctx_len. exit_tokens: where a run
        ends that has no other bound.
        """
        prefix = Path(binidx_prefix)
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").exists():
                raise MissingDataError(f"{suffix[1:].title()} file not found: {prefix}{suffix}")
        self._prepare([], [str(prefix.absolute())], "train")
        self._exit_tokens = exit_tokens
        if magic_prime is not None and magic_prime != self.magic_prime:
            log.warning(
                "magic_prime %d is not used: for ctx_len %d this data has %s",
                magic_prime, self.model_config.ctx_len, self.magic_prime,
            )  # fmt: skip

    def initialize_model(self, force: bool = False, random_seed: int = -1) -> Path:
        """Write out/rwkv-init.pth unless a fitting one is there; `force` replaces it. Returns its path."""
        from rwkv_cluster.train.run import initialize

        self._require_data("Data must be prepared before model initialization")
        self.training_config = _changed(self.training_config, random_seed=random_seed)
        return initialize(self.config, force=force, tokenizer=self.tokenizer)

    def train(
        self,
        data: np.ndarray | None = None,
        num_epochs: int | None = None,
        continue_training: bool = False,
        random_seed: int = -1,
    ) -> Any:
        """Train to the end, or continue where the last call ended. Returns the TrainResult.

        data: prepared first, as by `prepare_data`; None: what is prepared. num_epochs: passes over the token file;
        default training_config's bounds, or one. continue_training: refuse to start from the beginning.
        """
        from rwkv_cluster.train.checkpoint import list_steps
        from rwkv_cluster.train.run import train

        if data is not None:
            self.prepare_data(data)
        self._require_data("Either provide data or call prepare_data() first")
        if continue_training and not list_steps(self._paths.checkpoints):
            raise MissingCheckpointError(
                f"continue_training is set, but {self._paths.checkpoints} has no checkpoint. Call train() without it"
            )
        changes: dict[str, Any] = {"num_epochs": num_epochs} if num_epochs is not None else {}
        if random_seed != -1:
            changes["random_seed"] = random_seed
        training = self.training_config
        unbounded = num_epochs is None and not (training.num_epochs or training.max_steps or training.max_tokens)
        if self._exit_tokens is not None and unbounded:
            changes["max_tokens"] = self._exit_tokens
        self.training_config = _changed(training, **changes)
        return train(self.config, tokenizer=self.tokenizer, manifest=self.manifest)

    def train_from_checkpoint(
        self,
        checkpoint_path: str | Path,
        num_epochs: int | None = None,
        auto_detect: bool = True,
        override_config: Mapping[str, Any] | None = None,
    ) -> Any:
        """Start a new run from the weights in an RWKV .pth file.

        auto_detect: take the architecture from the file. override_config: fields of ModelConfig to set after that.
        Raises CheckpointError when the file's vocabulary is smaller than the tokenizer's or its shape does not fit.
        """
        from rwkv_cluster.model.state_dict import infer_model_config, load_pth

        self._require_data("Data must be prepared before training")
        path = Path(checkpoint_path)
        if not path.exists():
            raise MissingCheckpointError(f"Checkpoint not found: {path}")
        if auto_detect:
            detected = infer_model_config(load_pth(path)).model_copy(update={"ctx_len": self.model_config.ctx_len})
            if detected.vocab_size < self.tokenizer.vocab_size:
                raise CheckpointError(
                    f"Vocab size mismatch: {path} has {detected.vocab_size} rows, the tokenizer has "
                    f"{self.tokenizer.vocab_size} ids. Use the tokenizer that the file was trained with"
                )
            self.model_config = detected
        self.model_config = _changed(self.model_config, **(override_config or {}))
        self.training_config = _changed(self.training_config, init_from=str(path.absolute()))
        return self.train(num_epochs=num_epochs)

    def inspect_checkpoint(self, path: str | Path) -> dict[str, Any]:
        """Architecture and size of a weights file, see `inspect_rwkv_checkpoint`."""
        from rwkv_cluster.model.compatibility import inspect_rwkv_checkpoint

        return inspect_rwkv_checkpoint(path)

    def list_checkpoints(self) -> list[Path]:
        """The weights files in out/, in the order of training: init, epochs by number, final."""
        ranked = [(rank, path) for path in self.output_dir.glob("rwkv-*.pth") if (rank := _rank_of(path)) is not None]
        return [path for _, path in sorted(ranked)]

    def get_latest_checkpoint(self) -> Path | None:
        """The furthest trained weights file in out/; None before the first epoch's end."""
        trained = [path for path in self.list_checkpoints() if path.name != "rwkv-init.pth"]
        return trained[-1] if trained else None

    def _prepare(self, arrays: Sequence[np.ndarray], inputs: Sequence[str], data_name: str) -> dict[str, Any]:
        from rwkv_cluster.train.run import prepare_data

        self.data_config = _changed(self.data_config, inputs=list(inputs))
        self._exit_tokens = None
        self.manifest = prepare_data(self.config, tokenizer=self.tokenizer, arrays=arrays, name=data_name)
        return {
            "jsonl_path": self.data_dir / f"{data_name}.jsonl",
            "binidx_prefix": self.data_prefix,
            "vocab_path": self.data_dir / "vocab.txt",
            "num_sequences": self.manifest.n_documents,
            "total_tokens": self.manifest.n_tokens,
            "magic_prime": self.magic_prime,
        }

    def _require_data(self, message: str) -> None:
        if self.manifest is None:
            try:
                self.manifest = load_manifest(self.data_dir)
            except DataError as error:
                raise DataError(f"{message}: {error}") from error

    def _set_tokenizer(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.data_pipeline = DataPipeline(tokenizer)
        self.model_config = _changed(self._wanted_model, vocab_size=tokenizer.vocab_size)

    def _stored_config(self) -> Config:
        path = self._paths.configs / "config.yaml"
        return load_config(path) if path.exists() else Config(logging=LoggingConfig(sample_tokens=0))

    def _write_config(self) -> None:
        atomic_write(self.config_dir / "config.yaml", dump_yaml(self.config).encode())
        atomic_write(self.config_dir / "config.json", dump_json(self.config).encode())


def _changed(section: Any, **changes: Any) -> Any:
    """A validated copy of a section with other values. Raises ConfigError for a name or value that it does not take."""
    unknown = [name for name in changes if name not in type(section).model_fields]
    if unknown:
        names = ", ".join(type(section).model_fields)
        raise ConfigError(f"{type(section).__name__} has no field {unknown[0]}. Its fields are {names}")
    return type(section)(**{**section.model_dump(), **changes})


def _existing(path: str | Path, what: str) -> str:
    if not Path(path).exists():
        raise MissingDataError(f"{what} not found: {path}")
    return str(Path(path).absolute())


def _rank_of(path: Path) -> float | None:
    label = path.stem.removeprefix("rwkv-")
    named = {"init": -1.0, "final": float("inf")}
    return named.get(label, float(label) if label.isdigit() else None)
