"""Training configs: what is accepted, and what a wrong one is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from embstore.errors import ConfigError
from embstore.train.config import TrainConfig, load_config
from embstore.train.model import make_table

CONFIGS = Path(__file__).parents[3] / "configs"
GOOD = """
[data]
path = "events.csv"
user = "u"
item = "i"
time = "t"
"""


def load(tmp_path: Path, text: str, *overrides: str) -> TrainConfig:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load_config(path, overrides)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.name)
def test_committed_configs_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every config in the repository loads, and reads its data from where the environment says."""
    monkeypatch.setenv("EMBSTORE_DATA", "/somewhere")
    assert load_config(path).data.path.startswith("/somewhere/")


def test_defaults_and_relative_path(tmp_path: Path) -> None:
    """A minimal config means full tables, and a data path beside the config file."""
    config = load(tmp_path, GOOD)
    assert config.data.path == str(tmp_path / "events.csv")
    assert (config.tables.user.scheme, config.tables.item.ratio, config.data.split) == ("full", None, "leave_last_out")


def test_overrides(tmp_path: Path) -> None:
    """`section.key=value` sets numbers, text and keys that the file does not have."""
    config = load(tmp_path, GOOD, "tables.item.scheme=memcom", "tables.item.ratio=16", "training.l2=0.5", "seed=3")
    assert (config.tables.item.scheme, config.tables.item.ratio) == ("memcom", 16.0)
    assert (config.training.l2, config.seed) == (0.5, 3)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("[training]\nbatchsize = 5", ["training.batchsize", "did you mean training.batch_size"]),
        ("[trainig]\n", ["unknown key trainig", "did you mean training"]),
        ("[training]\nbatch_size = '5'", ["training.batch_size must be an integer, got '5'"]),
        ("[training]\nbatch_size = true", ["training.batch_size must be an integer, got True"]),
        ("[training]\nbatch_size = 1", ["training.batch_size must be an integer >= 2, got 1"]),
        ("[training]\nlearning_rate = nan", ["training.learning_rate must be a number > 0.0, got nan"]),
        ("[training]\nl2 = -1", ["training.l2 must be a number >= 0.0, got -1"]),
        ("[evaluation]\ncutoff = 0", ["evaluation.cutoff must be an integer >= 1, got 0"]),
        ("[tables.item]\nratio = 2\nbudget = 100", ["tables.item", "ratio or budget"]),
        ("[tables.item]\nratio = 0.5", ["tables.item.ratio must be a number >= 1.0, got 0.5"]),
        ("[tables.item]\nbudget = '4 apples'", ["tables.item", "4MB"]),
        ("[tables]\nitem = 3", ["tables.item must be a table, got 3"]),
        ("[publish]\nnum_hot_ids = -1", ["publish.num_hot_ids"]),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, more: str, words: list[str]) -> None:
    """The message names the key, and says what would be right."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD + more)
    assert str(caught.value).startswith(f"{tmp_path / 'config.toml'}: ")
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.split=given", ["data: split = 'given' needs split_column"]),
        (
            "data.split=leave_one_out",
            ["must be one of leave_last_out, given", "did you mean leave_last_out?"],
        ),
        ("task=rankin", ["task must be one of ranking", "did you mean ranking?"]),
        ("seed=-1", ["seed"]),
        ("data.path=${EMBSTORE_NO_SUCH_VARIABLE}/x.csv", ["EMBSTORE_NO_SUCH_VARIABLE", "not set"]),
        ("data.path=3", ["data.path must be a string, got 3"]),
        ("data.user.name=3", ["data.user is not a section"]),
        ("no-equals-sign", ["KEY=VALUE", "training.max_epochs=5"]),
        ("=5", ["KEY=VALUE", "training.max_epochs=5"]),
        ("training.=5", ["section.key=value", "training.max_epochs=5"]),
        ("data.train_value=0", ["belong to split"]),
    ],
)
def test_wrong_overrides_are_named(tmp_path: Path, override: str, words: list[str]) -> None:
    """An override is held to the same rules as the file."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, GOOD, override)
    for word in words:
        assert word in str(caught.value)


def test_missing_key_and_broken_files(tmp_path: Path) -> None:
    """A missing key, a missing file and a file that is not TOML are each named."""
    with pytest.raises(ConfigError, match=r"data\.path is missing"):
        load(tmp_path, "[data]\nuser = 'u'\nitem = 'i'\ntime = 't'")
    with pytest.raises(ConfigError, match="data is missing"):
        load(tmp_path, "seed = 1")
    with pytest.raises(ConfigError, match="not valid TOML"):
        load(tmp_path, "seed = = 1")
    with pytest.raises(ConfigError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("scheme = 'memcon'", ["tables.item", "did you mean 'memcom'"]),
        ("scheme = 'memcom'", ["tables.item", "needs a size", "num_buckets"]),
        ("scheme = 'memcom'\nratio = 16\nbuckets = 3", ["unknown key buckets", "num_buckets"]),
        ("scheme = 'memcom'\nratio = 4\nnum_buckets = 3", ["tables.item", "not both"]),
        ("scheme = 'memcom'\nratio = 500", ["tables.item", "the least is"]),
        ("scheme = 'qr'\nnum_buckets = 'many'", ["tables.item", "num_buckets", "whole number"]),
        ("ratio = 2", ["tables.item", "full"]),
    ],
)
def test_impossible_tables_are_named(tmp_path: Path, table: str, words: list[str]) -> None:
    """A scheme that does not exist, or cannot have the size asked for, is refused under its table's name."""
    config = load(tmp_path, f"{GOOD}[tables.item]\n{table}")
    with pytest.raises(ConfigError) as caught:
        make_table("item", config.tables.item, 1000, config.model, 0)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("scheme", "option"), [("hash", ""), ("qr", 'op = "concat"'), ("memcom", "bias = true")])
def test_ratio_is_kept(tmp_path: Path, scheme: str, option: str) -> None:
    """A table at ratio 8 takes at most an eighth of the plain table's bytes, and nearly all of that."""
    config = load(tmp_path, f"{GOOD}[tables.item]\nscheme = '{scheme}'\nratio = 8\n{option}")
    table = make_table("item", config.tables.item, 4000, config.model, 0)
    allowed = 4000 * 64 * 4 // 8
    assert 0.95 * allowed < table.num_bytes() <= allowed
