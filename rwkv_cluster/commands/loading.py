"""What most commands load first: the run's configuration, and torch in little time."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rwkv_cluster.config import Config
    from rwkv_cluster.config.recipes import FoundConfig

logger = logging.getLogger("rwkv_cluster")


def named_config(options: argparse.Namespace, overrides: Sequence[str] = ()) -> FoundConfig:
    """Configuration that `options` name, with their overrides and then `overrides`. Raises ConfigError."""
    from rwkv_cluster.config.recipes import find_config

    run = find_config(options.config, [*options.overrides, *overrides])
    if run.notice:
        logger.info(run.notice)
    return run


def trusted_config(options: argparse.Namespace, overrides: Sequence[str] = ()) -> Config:
    """Configuration of a command that may use the tokenizer, whose class is then the user's own choice.

    Raises ConfigError.
    """
    run = named_config(options, overrides)
    run.require_own_tokenizer()
    return run.resolved.config


@contextlib.contextmanager
def importing_torch() -> Iterator[None]:
    """Disable the garbage collector while torch and what comes with it are imported: saves a third of a short run.

    The import makes no garbage. What it has loaded is kept out of later collections too, also of that at the end.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        with _without_what_is_not_used():
            yield
    finally:
        gc.freeze()
        gc.enable()


@contextlib.contextmanager
def _without_what_is_not_used() -> Iterator[None]:
    """Keep torchmetrics, which Lightning imports, from loading matplotlib and transformers wherever they are installed.

    Each takes seconds; and matplotlib fails without a home directory or by a notebook's MPLBACKEND, transformers beside
    an older package that it wants newer.
    """
    from lightning_utilities.core.imports import RequirementCache

    is_met = RequirementCache.__bool__

    def is_met_and_used(self: RequirementCache) -> bool:
        return not (self.requirement or "").startswith(("matplotlib", "transformers")) and is_met(self)

    RequirementCache.__bool__ = is_met_and_used  # type: ignore[method-assign]
    try:
        yield
    finally:
        RequirementCache.__bool__ = is_met  # type: ignore[method-assign]
