"""Settings from YAML: what is right is read, what is wrong is named with its field and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_settings, settings_from_dict
from configs.schema import Settings

SERVE_FILE = """
http_options: {host: 127.0.0.1, port: 8123}
applications:
  - name: tidegate
    import_path: deployments.app:build_app
    args: {dp: 2, engine: {page_size: 32}}
"""


def _written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text)
    return path


def test_no_file_is_the_defaults() -> None:
    assert load_settings() == Settings()


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    assert load_settings(_written(tmp_path, "# nothing yet\n")) == Settings()


def test_a_file_and_overrides_on_top(tmp_path: Path) -> None:
    path = _written(tmp_path, "dp: 2\nengine:\n  page_size: 32\n  max_running: 8\n")
    settings = load_settings(path, {"engine.max_running": 9, "model.served_name": "mine"})
    assert (settings.dp, settings.engine.page_size, settings.engine.max_running) == (2, 32, 9)
    assert settings.model.served_name == "mine"


def test_an_override_into_an_empty_group(tmp_path: Path) -> None:
    assert load_settings(_written(tmp_path, "engine:\n"), {"engine.page_size": 8}).engine.page_size == 8


def test_a_serve_config_gives_its_application_and_its_door(tmp_path: Path) -> None:
    settings = load_settings(_written(tmp_path, SERVE_FILE))
    assert (settings.dp, settings.engine.page_size) == (2, 32)
    assert (settings.api.host, settings.api.port) == ("127.0.0.1", 8123)


def test_a_door_that_contradicts_the_settings_is_refused(tmp_path: Path) -> None:
    text = SERVE_FILE.replace("dp: 2", "dp: 2, api: {host: localhost}")
    with pytest.raises(ConfigError, match=r"http_options.host is '127.0.0.1' but args.api.host is 'localhost'"):
        load_settings(_written(tmp_path, text))


@pytest.mark.parametrize("applications", ["[]", "[{name: a}, {name: b}]", "7", "[7]"])
def test_a_serve_config_has_exactly_one_application(tmp_path: Path, applications: str) -> None:
    with pytest.raises(ConfigError, match="exactly one Serve application"):
        load_settings(_written(tmp_path, f"applications: {applications}\n"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("engine:\n  devise: cpu\n", r"unknown setting 'engine\.devise'; did you mean 'engine\.device'\?"),
        ("engin: {}\n", r"unknown setting 'engin'; did you mean 'engine'\?"),
        ("zzz: 1\n", r"unknown setting 'zzz'; known here: model, engine, "),
        ("engine:\n  page_size: big\n", r"setting 'engine\.page_size': .*given 'big'"),
        ("engine:\n  page_size: 0\n", r"setting 'engine\.page_size': .*greater than or equal to 1, given 0"),
        ("engine: 3\n", r"setting 'engine' must be a group of settings, not a int"),
        ("control:\n  max_timeout_s: .nan\n", r"setting 'control\.max_timeout_s': .*finite"),
        ("control:\n  max_timeout_s: .inf\n", r"setting 'control\.max_timeout_s': .*finite"),
        ("ray:\n  deployment: No Spaces\n", r"setting 'ray\.deployment'"),
        ("dp: 2\ndp: 3\n", r"key 'dp' is given twice, the second time in line 2"),
        ("dp: [1\n", r"is not YAML: .*line"),
        ("- dp\n", r"must hold a mapping of settings, not a list"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_settings(_written(tmp_path, text))


def test_all_faults_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from_dict({"dp": 0, "engine": {"devise": "cpu"}, "api": {"port": 70000}})
    assert all(name in caught.value.message for name in ("'dp'", "'engine.devise'", "'api.port'"))


def test_a_key_is_never_repeated_in_an_error() -> None:
    with pytest.raises(ConfigError) as caught:
        settings_from_dict({"api": {"admin_key": ["hunter2"], "api_key": {"hunter2": 1}}})
    assert "hunter2" not in caught.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_settings(tmp_path / "absent.yaml")


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_settings(path)


def test_a_lease_is_long_enough_to_be_renewed_in() -> None:
    assert settings_from_dict({"control": {"lease_s": 0.1}}).control.lease_s == 0.1
    with pytest.raises(ConfigError, match="lease_s"):
        settings_from_dict({"control": {"lease_s": 0.05}})
