"""Every row of bad_inputs.py: one sentence, exit code 2 of a command, and no file created or changed."""

import io
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from bad_files import prepare
from bad_inputs import CALLS, COMMANDS
from disk import disk_of

from multilora_fast import cli


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared") / "root"
    root.mkdir()
    prepare(root)
    return root


@pytest.fixture
def root(prepared, tmp_path, monkeypatch) -> Path:
    copy = tmp_path / "root"
    shutil.copytree(prepared, copy)
    monkeypatch.chdir(copy)
    monkeypatch.setattr(tempfile, "tempdir", str(copy / "tmp"))
    monkeypatch.setattr(os, "access", os.access)  # so that a row's own is taken back
    return copy


def everything(root: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def command(words: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["multilora-fast", *shlex.split(words)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # to whatever might be asked
    with pytest.raises(SystemExit) as exit:
        cli.main()
    return exit.value.code


def rows(table):
    return [pytest.param(row, id=row.name) for row in table]


@pytest.mark.parametrize("row", rows(COMMANDS))
def test_a_command_says_what_is_wrong_in_one_line_and_writes_nothing(row, root, prepared, monkeypatch, capsys):
    if row.before:
        row.before()
    before = everything(root)
    with disk_of(row.disk):
        code = command(row.call.format(root=prepared), monkeypatch)
    said = capsys.readouterr().err
    assert code == 2, said
    line = said.splitlines()[-1]
    assert line.startswith("multilora-fast: "), said
    assert row.says in line
    assert len(line) < 600
    assert "Traceback" not in said
    assert everything(root) == before


@pytest.mark.parametrize("row", rows(CALLS))
def test_a_call_says_what_is_wrong_in_one_sentence_and_writes_nothing(row, root):
    if row.before:
        row.before()
    before = everything(root)
    with disk_of(row.disk), pytest.raises(ValueError if row.disk is None else OSError) as error:
        row.call()
    assert row.says in str(error.value)
    assert "\n" not in str(error.value)
    assert everything(root) == before
