"""Settings: flags, environment variables, defaults, deprecated names and error messages."""

from dataclasses import fields

import pytest

from server import __version__
from server.config import DEPRECATED_FLAGS, Config, parse


def variable(flag: str) -> str:
    """Return the environment variable of a flag."""
    return f"SAMOVAR_{flag.strip('-').replace('-', '_').upper()}"


def test_parse_without_flags_and_environment_returns_defaults() -> None:
    assert parse([], {}) == Config()


def test_flags_override_environment_and_environment_overrides_defaults() -> None:
    environment = {"SAMOVAR_PORT": "9001", "SAMOVAR_FORMATS": "torchscript"}
    assert parse([], environment).port == 9001
    assert parse(["--port", "9002"], environment).port == 9002
    assert parse([], environment).formats == ("torchscript",)
    assert parse(["--formats", "onnx,onnx"], {}).formats == ("onnx",)
    assert parse([], {}).port == 8001


def test_parse_ignores_unknown_environment_variables() -> None:
    assert parse([], {"SAMOVAR_ADDRESS": "localhost:1", "SAMOVAR_TEAPOT": "x"}) == Config()


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("--port", "x", "an integer from 0 to 65535"),
        ("--port", "99999", "an integer from 0 to 65535"),
        ("--metrics-port", "-1", "an integer from 0 to 65535"),
        ("--formats", "cuneiform", "onnx, torchscript, torch_export"),
        ("--max-batch-rows", "0", "an integer from 1 to 65536"),
        ("--max-message-mib", "5000", "an integer from 1 to 2047"),
        ("--drain-timeout", "nan", "a number of seconds, at least 0"),
        ("--drain-timeout", "soon", "a number of seconds, at least 0"),
        ("--cuda-graphs", "maybe", "on or off"),
        ("--log-level", "loud", "'debug', 'info', 'warning', 'error'"),
    ],
)
def test_invalid_value_exits_with_flag_expected_and_given(
    flag: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, environment in (([flag, value], {}), ([], {variable(flag): value})):
        with pytest.raises(SystemExit) as exit_:
            parse(arguments, environment)
        assert exit_.value.code == 2
        message = " ".join(capsys.readouterr().err.split())
        assert flag in message
        assert variable(flag) in message
        assert expected in message
        assert f"'{value}'" in message


def test_unknown_flag_exits_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--teapot", "1"], {})
    assert exit_.value.code == 2
    assert "--teapot" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), DEPRECATED_FLAGS.items())
def test_deprecated_names_set_the_new_setting_and_warn(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = new.strip("-").replace("-", "_")
    for arguments, environment in (([old, "7"], {}), ([f"{old}=7"], {}), ([], {variable(old): "7"})):
        assert getattr(parse(arguments, environment), name) == 7
        (line,) = capsys.readouterr().err.splitlines()
        named = (old, new) if arguments else (variable(old), variable(new))
        assert all(name in line for name in ("deprecated", *named))


def test_new_environment_variable_overrides_deprecated_one() -> None:
    environment = {"SAMOVAR_GRPC_WORKERS": "2", "SAMOVAR_FRONT_ENDS": "3"}
    assert parse([], environment).grpc_workers == 2


def test_help_lists_flags_variables_and_defaults_but_no_deprecated_names(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"], {})
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for setting in fields(Config):
        flag = f"--{setting.name.replace('_', '-')}"
        assert flag in text
        assert variable(flag) in text
    assert "default: 8001" in text
    assert "python -m server --models models" in text
    assert not any(flag in text.split() for flag in DEPRECATED_FLAGS)


def test_version_prints_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(["--version"], {})
    assert exit_.value.code == 0
    assert __version__ in capsys.readouterr().out
