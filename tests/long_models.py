"""Models that are tried out when they are added, and do not load: refused, and nothing of them stays."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY, Cli
from test_models import WEIGHTS


def _no_tokenizer(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"}')


def _other_shape(model: Path) -> None:
    """Have the configuration tell of more layers than there are weights for."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1}))


@pytest.mark.parametrize(("change", "says"), [(_no_tokenizer, "its tokenizer cannot be loaded"), (_other_shape, "its files lack")])
def test_model_that_does_not_load_is_refused(change: Callable[[Path], None], says: str, tmp_path: Path, cold_cli: Cli) -> None:
    """What no header shows is found by the process that quantises; without it the model is taken."""
    model = shutil.copytree(TINY, tmp_path / "model")
    change(model)
    file = tmp_path / "agent.toml"
    file.write_text('node = "n"\nstate_directory = "node"\nbudget = "1GiB"\ndevice = "cpu"\n')
    refused = cold_cli("models", "add", model, "--config", file, "--json")
    assert (refused.code, refused.json["error"]["code"]) == (5, "model_unsupported")
    assert says in refused.json["error"]["text"]
    assert not [*(tmp_path / "node" / "models").rglob(WEIGHTS)]
    assert cold_cli("models", "add", model, "--no-quantise", "--config", file).code == 0
