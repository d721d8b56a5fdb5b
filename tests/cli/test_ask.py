"""`ringjax ask`: what it says and how it exits. Whole answers are compared in tests/inference."""

import io
import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from models.test_checkpoints import cut, make_weights, write_folder, write_gguf

from ringjax.cli import main
from ringjax.cli.document import plant, read_document
from ringjax.cli.errors import CommandError

Capture = pytest.CaptureFixture[str]

CHAT_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}<|im_start|>"
LETTERS = " .?'-abcdefghijklmnopqrstuvwxyzW"


def write_model(path: Path, **metadata: Any) -> Path:
    """A random model of 48 tokens and a context of 128, with a tokenizer of letters."""
    byte_of = dict(zip(" ", "Ġ", strict=True))
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens += [byte_of.get(letter, letter) for letter in LETTERS]
    tokens += ["Ċ", *(str(digit) for digit in range(10))]
    tokens += [f"<unused{i}>" for i in range(48 - len(tokens))]
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 45
    defaults: dict[str, Any] = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": tokens,
        "token_types": kinds,
        "token_merges": ["a b"],
        "eos_token_id": 2,
        "bos_token_id": 1,
        "chat_template": CHAT_TEMPLATE,
    }
    if "ab" not in tokens:
        tokens[-1] = "ab"
    return write_gguf(path, make_weights(), **defaults | metadata)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.fixture
def document(tmp_path: Path) -> Path:
    path = tmp_path / "document.txt"
    path.write_text("the cat sat.\n")
    return path


def ask(*arguments: object) -> int:
    """In this process; the exit status."""
    try:
        main(["ask", *map(str, arguments)])
    except SystemExit as error:
        return int(error.code or 0)
    return 0


def refused(capsys: Capture, *arguments: object) -> str:
    """The one line on stderr of a command that exits with 2."""
    status = ask(*arguments)
    said = capsys.readouterr()
    assert status == 2, said
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("ringjax: error: ")
    return lines[0].removeprefix("ringjax: error: ")


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """In a process of its own, which has what a test process has set up already to do itself."""
    return subprocess.run(
        [sys.executable, "-c", "from ringjax.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        timeout=300,
        **options,
    )


# ---------------------------------------------------------------- a whole run

KEYS = {
    "answer": str,
    "token_ids": list,
    "prompt_ids": list,
    "prompt_tokens": int,
    "ring_size": int,
    "tokens_per_device": int,
    "cache_bytes_per_device": int,
    "compile_seconds": float,
    "time_to_first_token": float,
    "tokens_per_second": float,
}


def test_json_is_one_object_and_standard_input_is_a_document(model: Path) -> None:
    done = command(
        "ask", "-", "where is the cat?", "--model", model, "--devices", 3, "--max-tokens", 6,
        "--json", input=b"the cat sat.\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    (line,) = done.stdout.decode().splitlines()
    report = json.loads(line)
    for key, kind in KEYS.items():
        assert isinstance(report[key], kind), key
    assert report["ring_size"] == 3
    assert report["prompt_tokens"] == len(report["prompt_ids"])
    assert len(report["token_ids"]) <= 6
    length = report["prompt_tokens"]
    slots = -(-length // 6) * 6 // 3 + 2  # zigzag, and 5 tokens more over 3 ranks
    assert report["tokens_per_device"] == slots
    assert report["cache_bytes_per_device"] == slots * 2 * 2 * 2 * 16 * 4
    assert "Traceback" not in done.stderr.decode()


def test_answers_in_words_stream_to_standard_output(model: Path, document: Path, capsys: Capture) -> None:
    options = ("--model", model, "--devices", 2, "--max-tokens", 5, "--seed", 3)
    assert ask(document, "where?", *options, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert ask(document, "where?", *options) == 0
    said = capsys.readouterr()
    assert said.out == report["answer"] + "\n"
    for words in ("2 devices", f"{report['prompt_tokens']} tokens", "with compilation", "per second"):
        assert words in said.err


@pytest.mark.parametrize(
    "options",
    [("--layout", "contiguous"), ("--dtype", "bfloat16"), ("--temperature", "0.8", "--top-p", "0.9")],
    ids=lambda options: options[0],
)
def test_options_run(options: tuple[str, ...], model: Path, document: Path, capsys: Capture) -> None:
    arguments = (document, "where?", "--model", model, "--devices", 2, "--max-tokens", 2, "--json")
    assert ask(*arguments, *options) == 0
    report = json.loads(capsys.readouterr().out)
    if options[0] == "--layout":
        assert report["layout"] == "contiguous"
    if options[0] == "--dtype":
        assert report["cache_bytes_per_device"] == report["tokens_per_device"] * 2 * 2 * 2 * 16 * 2


def test_help_names_every_option(capsys: Capture) -> None:
    assert ask("--help") == 0
    said = capsys.readouterr().out
    for option in (
        "--model", "--devices", "--layout", "--max-tokens", "--temperature", "--top-p", "--seed",
        "--dtype", "--json", "DOCUMENT", "QUESTION",
    ):  # fmt: skip
        assert option in said, option


# ---------------------------------------------------------------- wrong input


def test_exit_status_of_the_process_is_2_and_stdout_empty(tmp_path: Path) -> None:
    done = command("ask", tmp_path / "nothing.txt", "why?")
    assert done.returncode == 2
    assert done.stdout == b""
    (line,) = done.stderr.decode().splitlines()
    assert line.startswith("ringjax: error: no document at '")
    assert "nothing.txt': give a text file, or - for standard input" in line


@pytest.mark.parametrize("content", [b"", b" \n\t\r\n "], ids=["empty", "whitespace"])
def test_empty_documents_are_refused(content: bytes, document: Path, capsys: Capture) -> None:
    document.write_bytes(content)
    assert "is empty: there is nothing to ask about" in refused(capsys, document, "why?")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"text\xff\xfe", "is not UTF-8 text: byte 4 is 0xff"),
        (b"\x7fELF\x01\x00\x00", "is not text: byte 5 is 0x00"),
    ],
)
def test_binary_documents_are_refused(content: bytes, match: str, document: Path, capsys: Capture) -> None:
    document.write_bytes(content)
    assert match in refused(capsys, document, "why?")


def test_empty_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\n")))
    assert refused(capsys, "-", "why?").startswith("standard input is empty")


def test_folder_as_a_document_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert "Is a directory" in refused(capsys, tmp_path, "why?")


@pytest.mark.parametrize("question", [(), ("",), ("  ",)], ids=["none", "empty", "blank"])
def test_document_without_a_question_is_refused(
    question: tuple[str, ...], document: Path, capsys: Capture
) -> None:
    assert "Give a question after the document" in refused(capsys, document, *question)


def test_document_longer_than_the_context_says_by_how_much(
    model: Path, document: Path, capsys: Capture
) -> None:
    options = ("--model", model, "--devices", 2, "--max-tokens", 8, "--json")
    document.write_text("a")
    assert ask(document, "b", *options) == 0
    length = json.loads(capsys.readouterr().out)["prompt_tokens"]
    document.write_text("ac" * 75)
    said = refused(capsys, document, "b", *options)
    tokens = length + 149
    assert f"is too long by {tokens + 8 - 128} tokens" in said
    assert f"it takes {tokens}, and the answer up to 8 more, but the model's context is 128" in said
    document.write_text("ac" * 40)  # fits by itself
    said = refused(capsys, document, "b", "--model", model, "--max-tokens", 60)
    assert f"is too long by {length + 79 + 60 - 128} tokens" in said


class TestModels:
    """Errors that come before any weight is read."""

    def refused(self, capsys: Capture, document: Path, model: object) -> str:
        return refused(capsys, document, "why?", "--model", model, "--devices", 2)

    def test_missing(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        said = self.refused(capsys, document, tmp_path / "no.gguf")
        assert "no model at '" in said

    def test_unknown_format(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04")
        said = self.refused(capsys, document, tmp_path / "m.gguf")
        assert r"is of an unknown format: it begins with b'PK\x03\x04'" in said

    def test_truncated(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        path = write_model(tmp_path / "m.gguf")
        cut(path, -100)
        assert "is truncated" in self.refused(capsys, document, path)

    def test_architecture(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        path = write_gguf(tmp_path / "m.gguf", make_weights(), arch="qwen2")
        said = self.refused(capsys, document, path)
        assert "architecture 'qwen2' is not supported" in said

    def test_architecture_of_a_folder(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        path = write_folder(tmp_path / "m", make_weights(), model_type="gemma")
        assert "'gemma' is not supported" in self.refused(capsys, document, path)

    def test_no_tokenizer(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        path = write_folder(tmp_path / "m", make_weights())
        assert "has no tokenizer.json" in self.refused(capsys, document, path)

    def test_damaged_tokenizer(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        path = write_folder(tmp_path / "m", make_weights())
        (path / "tokenizer.json").write_text("{}")
        assert "tokenizer" in self.refused(capsys, document, path)

    def test_unknown_tokenizer(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        path = write_model(tmp_path / "m.gguf", tokenizer_model="t5")
        assert "t5" in self.refused(capsys, document, path)

    def test_no_chat_template(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        path = write_model(tmp_path / "m.gguf", chat_template="{{ raise_exception('no thanks') }}")
        assert "no thanks" in self.refused(capsys, document, path)

    def test_folder_without_a_model(self, tmp_path: Path, document: Path, capsys: Capture) -> None:
        assert "has no config.json" in self.refused(capsys, document, tmp_path)


@pytest.mark.parametrize("count", [0, -1, 257, 100_000])
def test_devices_that_no_machine_has_are_refused(count: int, capsys: Capture) -> None:
    said = refused(capsys, "--devices", count)
    assert said == f"--devices {count} cannot be had: give a number from 1 to 256."


def test_devices_that_this_process_lacks_are_refused(capsys: Capture) -> None:
    # The tests' own backend has started with eight.
    assert "--devices 9 cannot be had: JAX sees 8 cpu devices" in refused(capsys, "--devices", 9)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--temperature", -1), "temperature must be 0 (greedy) or more, got -1.0"),
        (("--temperature", "nan"), "temperature must be 0 (greedy) or more, got nan"),
        (("--top-p", 0), "top_p must be above 0 and at most 1, got 0.0"),
        (("--max-tokens", 0), "--max-tokens 0: give at least 1"),
        (("--depth", 1.5), "--depth 1.5: give a number from 0 (first line) to 1 (last line)"),
        (("--depth", "nan"), "--depth nan"),
        (("--document-tokens", 0), "--document-tokens 0: give at least 1"),
        (("--seed", -1), "--seed -1: give a number from 0 to 4294967295"),
        (("--seed", 2**64), f"--seed {2**64}: give"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options: tuple[object, ...], match: str, capsys: Capture) -> None:
    assert match in refused(capsys, *options)


def test_words_for_numbers_are_refused_by_the_parser(capsys: Capture) -> None:
    assert ask("--devices", "many") == 2
    assert "--devices" in capsys.readouterr().err


# ---------------------------------------------------------------- the planted sentence


def words(text: str) -> list[int]:
    """A tokenizer, as far as its number of tokens matters."""
    return list(range(len(text.split())))


class TestPlant:
    def lines(self, depth: float, seed: int = 0, tokens: int = 300) -> tuple[Any, list[str]]:
        document = plant(words, depth=depth, tokens=tokens, rng=random.Random(seed))
        return document, document.text.splitlines()

    @pytest.mark.parametrize(("depth", "line"), [(0.0, 0), (1.0, -1)])
    def test_depth_is_the_first_and_the_last_line(self, depth: float, line: int) -> None:
        document, lines = self.lines(depth)
        sentence = f"The secret passphrase of the vault is '{document.passphrase}'."
        assert lines[line] == sentence
        assert lines.count(sentence) == 1

    def test_half_depth_is_the_middle(self) -> None:
        document, lines = self.lines(0.5)
        (where,) = (i for i, line in enumerate(lines) if document.passphrase in line)
        assert abs(where - (len(lines) - 1) / 2) <= 1

    def test_rest_is_the_source_and_the_length_is_kept(self) -> None:
        import argparse

        document, lines = self.lines(0.3, tokens=500)
        rest = [line for line in lines if document.passphrase not in line]
        source = Path(argparse.__file__).read_text(encoding="utf-8").splitlines()
        assert rest == source[: len(rest)]
        used = len(words("\n".join(rest)))
        assert used <= 500 < used + len(words(source[len(rest)]))

    def test_passphrase_is_the_seeds(self) -> None:
        phrases = [self.lines(0.5, seed)[0].passphrase for seed in (0, 0, 1)]
        assert phrases[0] == phrases[1] != phrases[2]
        assert len(set(phrases[0].split("-"))) == 3


def test_document_is_read_as_it_stands(document: Path) -> None:
    document.write_bytes("Grüße\r\n\tπ ".encode())
    found = read_document(str(document), "why?")
    assert (found.text, found.question, found.passphrase) == ("Grüße\r\n\tπ ", "why?", None)


def test_document_that_may_not_be_read_is_refused(document: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_bytes(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")  # to root too, whom the mode would not stop

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    with pytest.raises(CommandError, match="cannot read .*Permission denied"):
        read_document(str(document), "why?")


def test_tokens_stay_in_the_models_vocabulary(model: Path) -> None:
    from ringjax.models.checkpoints import open_checkpoint

    ids = open_checkpoint(model).tokenizer().encode("the cat abstains.")
    assert ids
    assert max(ids) < 48
    assert np.asarray(ids).min() >= 3
