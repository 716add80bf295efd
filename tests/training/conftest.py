"""Fixtures of the training tests: a small model with its tokenizer, rows of two tasks, and the command."""

import sys

import pytest
import torch
import typer
from tiny import llama
from tiny_training import CHATS, PROMPTS, make_tokenizer, write

from multilora_fast import cli
from multilora_fast.cli.train import train


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread: the model is too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "sky.jsonl", PROMPTS), write(tmp_path / "grass.jsonl", CHATS)


@pytest.fixture
def command(monkeypatch):
    """Runs the command as a shell does and returns its exit code."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(train)
    monkeypatch.setattr(cli, "app", app)

    def call(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["multilora-fast", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        return exit.value.code or 0

    return call
