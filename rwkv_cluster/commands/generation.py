"""generate and chat: continue a text with a trained model, and talk with it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rwkv_cluster.commands.loading import importing_torch
from rwkv_cluster.commands.subcommand import Result, Subcommand
from rwkv_cluster.errors import ConfigError

if TYPE_CHECKING:
    from rwkv_cluster.config import TokenizerConfig
    from rwkv_cluster.data.conversations.turns import Question


def _add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument("--prompt", default="", help="text to continue")
    parser.add_argument(
        "--template", metavar="NAME", help="answer --prompt as a question, in g1's text or that of a Jinja file"
    )
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="at most N tokens (default 200)")
    parser.add_argument("--output", metavar="FILE", help="write the text as it is, instead of showing it")


def _add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="WORK_DIR_OR_WEIGHTS", help="a run's directory, or a file or folder of weights"
    )
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter to add to the weights, a folder as peft has it")
    parser.add_argument("--state", metavar="FILE", help="state to begin from: of state tuning, or that chat has saved")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: always the likeliest (default 1)")
    parser.add_argument("--top-p", type=float, default=0.85, help="share of likely tokens kept (default 0.85)")
    parser.add_argument("--tokenizer", metavar="TYPE", help="of weights outside a work directory, e.g. world")
    parser.add_argument("--vocab-file", metavar="PATH", help="file of --tokenizer generic, world or hf")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice (default 0)")


def generate(options: argparse.Namespace) -> Result:
    """Continue the prompt with the model in a work directory, file or folder. Raises ConfigError for a bad option.

    The file of --output takes the text as it is, with what would command a terminal.
    """
    from rwkv_cluster.workdir import write_output

    tokenizer = _tokenizer(options.tokenizer, options.vocab_file)
    _check(options)
    _require_text("--prompt", options.prompt)
    prompt = options.prompt if options.template is None else _question(options.template, options.prompt)
    with importing_torch():
        from rwkv_cluster.train.sample import generate_text

    text = generate_text(
        Path(options.source),
        prompt,
        n_tokens=options.tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        tokenizer=tokenizer,
        adapter=_path(options.adapter),
        state=_path(options.state),
    )
    data = {"prompt": options.prompt, "text": text}
    if not options.output:
        return Result(text, data)
    output = Path(options.output)
    write_output(output, text)
    return Result(str(output), data)


def _check(options: argparse.Namespace) -> None:
    """Refuse a number out of its range. Raises ConfigError."""
    if options.tokens < 1:
        raise ConfigError(f"--tokens is {options.tokens}, expected an integer >= 1")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature is {options.temperature:g}, expected a number >= 0")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p is {options.top_p:g}, expected a number > 0 and <= 1")
    if not 0 <= options.seed < 2**63:
        raise ConfigError(f"--seed is {options.seed}, expected an integer >= 0 and <= 2^63 - 1")


def _require_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text", remedy="Check the terminal's encoding") from error


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


def _question(template: str, question: str) -> Question:
    """The question in the template's text. Raises ConfigError or MissingDataError."""
    from rwkv_cluster.data.conversations.template import load_template
    from rwkv_cluster.data.inputs.bad_lines import BadLine

    if not question.strip():
        raise ConfigError("--template answers a question, and --prompt has none")
    try:
        return load_template(template).ask(question)
    except BadLine as error:
        raise ConfigError(f"--prompt {error}", remedy="Correct the template") from error


def _tokenizer(kind: str | None, vocab_file: str | None) -> TokenizerConfig | None:
    """The tokenizer that the command line names, or None where it names none. Raises ConfigError."""
    from rwkv_cluster.config import TOKENIZER_TYPES
    from rwkv_cluster.config.loader import parse_config, yaml_text

    if kind is None and vocab_file is None:
        return None
    kind = kind or "generic"
    overrides = [f"data.tokenizer.type={yaml_text(kind)}"]
    if vocab_file:
        field = (kind in TOKENIZER_TYPES and TOKENIZER_TYPES[kind].file) or "vocab_file"
        overrides.append(f"data.tokenizer.{field}={yaml_text(vocab_file)}")
    return parse_config(b"work_dir: none", "command line", overrides).config.data.tokenizer


GENERATE = Subcommand("generate", "continue a text with a trained model", generate, _add_generate_arguments)


def _add_chat_arguments(parser: argparse.ArgumentParser) -> None:
    _add_model_arguments(parser)
    parser.add_argument(
        "--template", metavar="NAME", help="g1, or a Jinja file (default: the run's own data.template, else g1)"
    )
    parser.add_argument("--system", default="", metavar="TEXT", help="what the system says first")
    parser.add_argument(
        "--think", choices=("on", "off", "auto"), default="auto", help="begin answers with thinking (default auto)"
    )
    parser.add_argument("--tokens", type=int, default=2000, metavar="N", help="at most N an answer (default 2000)")


def chat(options: argparse.Namespace) -> Result:
    """Talk with the model in a work directory, file or folder until stdin ends. Raises ConfigError for a bad option."""
    if options.json:
        raise ConfigError("chat has no result for --json", remedy="generate --template g1 --json answers one question")
    tokenizer = _tokenizer(options.tokenizer, options.vocab_file)
    _check(options)
    _require_text("--system", options.system)
    source = Path(options.source)
    with importing_torch():
        from rwkv_cluster.chat.session import ChatOptions, ChatSession
        from rwkv_cluster.chat.terminal import converse
        from rwkv_cluster.data.conversations.template import load_template
        from rwkv_cluster.train.sample import load_generator, template_of

    template = load_template(options.template or template_of(source))
    model, chosen = load_generator(source, tokenizer, adapter=_path(options.adapter), state=_path(options.state))
    sampling = ChatOptions(options.tokens, options.temperature, options.top_p, options.seed, options.system)
    session = ChatSession(model, chosen, template, sampling)
    session.set_thinking(options.think)
    converse(session)
    return Result("", None)


CHAT = Subcommand("chat", "talk with a trained model in the terminal", chat, _add_chat_arguments)
