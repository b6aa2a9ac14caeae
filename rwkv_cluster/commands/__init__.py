"""The commands of `rwkv-cluster`, a row each: the argument parser, `--help` and the dispatch are made from them.

A command is a function of its options beside its row, in the module of its kind. These modules load nothing heavy:
what a command needs of the library it imports when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

from rwkv_cluster.commands.creating import NEW
from rwkv_cluster.commands.examining import BENCH, CONFIG, DOCTOR, INSPECT, LR_FIND, PLAN
from rwkv_cluster.commands.exporting import EXPORT, MERGE
from rwkv_cluster.commands.generation import CHAT, GENERATE
from rwkv_cluster.commands.launching import CANCEL, LAUNCH, LOGS
from rwkv_cluster.commands.reporting import REPORT, STATUS
from rwkv_cluster.commands.subcommand import Subcommand
from rwkv_cluster.commands.training import AVERAGE, BRANCH, CONSOLIDATE, EVAL, INIT, PREPARE, TRAIN

_IN_ORDER_OF_HELP = (
    *(NEW, PREPARE, INIT, TRAIN, BRANCH, LAUNCH, STATUS, REPORT, LOGS, CANCEL),
    *(GENERATE, CHAT, EVAL, EXPORT, MERGE, CONSOLIDATE, AVERAGE, INSPECT, CONFIG, PLAN, LR_FIND, DOCTOR, BENCH),
)
COMMANDS: dict[str, Subcommand] = {command.name: command for command in _IN_ORDER_OF_HELP}
