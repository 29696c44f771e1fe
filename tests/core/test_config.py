"""From YAML and words to a checked config: merging, and every error in the user's words."""

from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from franca.core.config import (
    Choice,
    check,
    config,
    differences,
    load,
    merge,
    parse_words,
    problems_error,
    read_yaml,
    to_dict,
    to_yaml,
)
from franca.core.duration import Duration
from franca.core.errors import ConfigError

PROPERTY = settings(derandomize=True, deadline=None, max_examples=30)


class ShapeConfig(Choice):
    """An open choice of two."""


@config
class CircleConfig(ShapeConfig):
    kind: Literal["circle"]
    radius: float = 1.0


@config
class SquareConfig(ShapeConfig):
    kind: Literal["square"]
    side: float = 2.0
    corners: Literal["sharp", "round"] = "sharp"


@config
class OptimConfig:
    lr: float = 1e-3
    warmup: Duration = Duration(100, "steps")
    betas: tuple[float, ...] = (0.9, 0.95)


@config
class PartConfig:
    path: str
    weight: float | None = None


@config
class AppConfig:
    name: str
    shape: ShapeConfig
    optim: OptimConfig = OptimConfig()
    second: OptimConfig | None = None
    parts: tuple[PartConfig, ...] = ()
    named: dict[str, PartConfig] | None = None
    steps: int = 10
    fast: bool = False
    imports: tuple[str, ...] = ()


MINIMAL = {"name": "x", "shape": {"kind": "circle"}}


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def refusal(values, cls=AppConfig):
    with pytest.raises(ConfigError) as caught:
        check(cls, values, "run.yaml")
    return str(caught.value)


def test_a_file_and_words_make_a_checked_config(tmp_path):
    path = write(tmp_path, "run.yaml", "name: é\nshape: {kind: square, side: 3}\noptim:\n  lr: 3e-4\n")
    loaded = load(AppConfig, path, ["optim.warmup=5M samples", "parts=[{path: a}, {path: b, weight: 2}]", "fast=true"])
    assert loaded == AppConfig(
        name="é",
        shape=SquareConfig(kind="square", side=3.0),
        optim=OptimConfig(lr=3e-4, warmup=Duration(5_000_000, "samples")),
        parts=(PartConfig(path="a"), PartConfig(path="b", weight=2.0)),
        fast=True,
    )
    with pytest.raises(AttributeError):
        loaded.name = "frozen"


@pytest.mark.parametrize(("text", "value"), [("3e-4", 3e-4), ("1e3", 1000.0), ("1E-5", 1e-5), ("3", 3.0), (".5", 0.5)])
def test_scientific_numbers_are_numbers_in_files_and_words(tmp_path, text, value):
    path = write(tmp_path, "run.yaml", f"optim: {{lr: {text}}}")
    assert read_yaml(path) == {"optim": {"lr": value}}
    assert parse_words([f"optim.lr={text}"]) == {"optim": {"lr": value}}


def test_base_files_lie_below_in_a_chain_and_are_found_from_where_they_are_named(tmp_path):
    write(tmp_path, "bases/deep/root.yaml", "a: 1\nb: 1\nc: 1\nsection: {x: 1, y: 1, list: [1, 2]}")
    write(tmp_path, "bases/middle.yaml", "base: deep/root.yaml\nb: 2\nc: 2\nsection: {y: 2}")
    top = write(tmp_path, "runs/run.yaml", "base: ../bases/middle.yaml\nc: 3\nsection: {list: [3]}")
    assert read_yaml(top) == {"a": 1, "b": 2, "c": 3, "section": {"x": 1, "y": 2, "list": [3]}}


@pytest.mark.parametrize("chain", [["one.yaml"], ["two.yaml", "one.yaml"], ["two.yaml", "three.yaml", "./two.yaml"]])
def test_a_circle_of_base_files_is_refused(tmp_path, chain):
    names = ["one.yaml", "two.yaml", "three.yaml"]
    for name, base in zip(names, chain, strict=False):
        write(tmp_path, name, f"base: {base}\n")
    with pytest.raises(ConfigError, match="`base:` goes round in a circle"):
        read_yaml(tmp_path / "one.yaml")


def test_a_missing_base_file_is_named(tmp_path):
    path = write(tmp_path, "run.yaml", "base: none.yaml\n")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        read_yaml(path)


@pytest.mark.parametrize("base", ["[a.yaml, b.yaml]", "3", "{a: 1}"])
def test_a_base_that_is_no_path_is_refused(tmp_path, base):
    with pytest.raises(ConfigError, match=r"run\.yaml: base: expected the path of one YAML file"):
        read_yaml(write(tmp_path, "run.yaml", f"base: {base}\n"))


def test_an_empty_file_is_an_empty_config(tmp_path):
    assert read_yaml(write(tmp_path, "run.yaml", "\n")) == {}
    assert read_yaml(write(tmp_path, "comment.yaml", "# nothing yet\n")) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "is not valid YAML"),
        ("a: 1\na: 2\n", "is not valid YAML.*duplicate key"),
        ("a: b: c", "is not valid YAML"),
        ("\tx: 1", "is not valid YAML"),
        ("just words", "expected `key: value` lines, got 'just words'"),
        ("- a\n- b\n", "expected `key: value` lines"),
        ("a: ${nowhere}", "is not valid YAML.*nowhere"),
    ],
)
def test_what_is_no_yaml_mapping_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=f"(?s)^{tmp_path}/run.yaml: {message}"):
        read_yaml(write(tmp_path, "run.yaml", text))


def test_a_file_that_is_missing_a_folder_or_no_text_is_refused(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    for name, message in [("none.yaml", "No such file"), (".", "Is a directory"), ("binary.yaml", "is not a text file")]:
        with pytest.raises(ConfigError, match=f"{message}.*Give the path of a YAML file"):
            read_yaml(tmp_path / name)


@pytest.mark.parametrize("word", ["steps", "=3", ".a=3", "a.=3", "a..b=3", "--steps", "run.yaml"])
def test_a_word_that_sets_nothing_is_refused(word):
    with pytest.raises(ConfigError, match=r"expected a setting of the form section\.key=value, for example optim\.lr=3e-4"):
        parse_words(["a=1", word])


def test_words_are_dot_lists():
    words = ["a.b.c=1", "a.b.d=text with = sign", "a.list=[x, 2]", "a.none=null", "a.b.c=4"]
    assert parse_words(words) == {"a": {"b": {"c": 4, "d": "text with = sign"}, "list": ["x", 2], "none": None}}
    assert parse_words([]) == {}


def test_a_word_that_is_no_yaml_is_refused():
    with pytest.raises(ConfigError, match=r"a=\[1, : is not valid YAML"):
        parse_words(["a=[1, "])


def test_another_kind_replaces_the_section_and_the_same_kind_or_none_changes_it(tmp_path):
    write(tmp_path, "base.yaml", "name: x\nshape: {kind: square, side: 7, corners: round}\n")
    path = write(tmp_path, "run.yaml", "base: base.yaml\n")
    assert load(AppConfig, path, ["shape.side=8"]).shape == SquareConfig(kind="square", side=8, corners="round")
    assert load(AppConfig, path, ["shape.kind=square"]).shape == SquareConfig(kind="square", side=7, corners="round")
    assert load(AppConfig, path, ["shape.kind=circle"]).shape == CircleConfig(kind="circle")
    assert load(AppConfig, path, ["shape.kind=circle", "shape.radius=5"]).shape == CircleConfig(kind="circle", radius=5)


def test_merging_changes_neither_side():
    under, over = {"a": {"x": 1}, "b": [1]}, {"a": {"y": 2}, "b": [2]}
    assert merge(under, over) == {"a": {"x": 1, "y": 2}, "b": [2]}
    assert (under, over) == ({"a": {"x": 1}, "b": [1]}, {"a": {"y": 2}, "b": [2]})
    assert merge({"a": {"x": 1}}, {"a": None}) == {"a": None}
    assert merge({"a": 1}, {"a": {"x": 1}}) == {"a": {"x": 1}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "stepz: unknown key (did you mean 'steps'?)"),
        ({"optim": {"learning_rate": 3}}, "optim.learning_rate: unknown key (known here: betas, lr, warmup)"),
        ({"optim": {"warmpu": "5 steps"}}, "optim.warmpu: unknown key (did you mean 'warmup'?)"),
        ({"second": {"lrr": 3}}, "second.lrr: unknown key (did you mean 'lr'?)"),
        ({"parts": [{"path": "a"}, {"path": "b", "wieght": 3}]}, "parts[1].wieght: unknown key (did you mean 'weight'?)"),
        ({"named": {"mine": {"path": "b", "wieght": 3}}}, "named.mine.wieght: unknown key (did you mean 'weight'?)"),
        ({"shape": {"kind": "circle", "side": 3}}, "shape.side: unknown key (known here: kind, radius)"),
        ({"shape": {"kind": "circel"}}, "shape.kind: 'circel' is not one of circle, square (did you mean 'circle'?)"),
        ({"shape": {"side": 3}}, "shape.kind: is required and was not given; one of circle, square"),
        ({"shape": {"kind": "square", "corners": "x"}}, "shape.corners: 'x' is not one of 'sharp' or 'round'"),
        ({"parts": [{"weight": 1.0}]}, "parts[0].path: is required and was not given"),
        ({"steps": 3.5}, "steps: input should be a valid integer, got 3.5 (float)"),
        ({"steps": "3"}, "steps: input should be a valid integer, got '3' (str)"),
        ({"steps": True}, "steps: input should be a valid integer, got True (bool)"),
        ({"fast": 1}, "fast: input should be a valid boolean, got 1 (int)"),
        ({"name": 3}, "name: input should be a valid string, got 3 (int)"),
        ({"optim": {"lr": "fast"}}, "optim.lr: input should be a valid number, got 'fast' (str)"),
        ({"optim": {"betas": [0.9, "x"]}}, "optim.betas[1]: input should be a valid number, got 'x' (str)"),
        ({"optim": {"betas": 0.9}}, "optim.betas: input should be a valid array, got 0.9 (float)"),
        ({"optim": {"warmup": "5 lightyears"}}, "optim.warmup: '5 lightyears': 'lightyears' is not a unit"),
        ({"optim": {"warmup": 5}}, "optim.warmup: 5 is not a number and a unit, for example '2000 steps'"),
        ({"imports": "json"}, "imports: input should be a valid array, got 'json' (str)"),
        ({"imports": ["no_such_module_here"]}, "imports: 'no_such_module_here' cannot be imported"),
    ],
)
def test_one_problem_is_one_line_with_its_dotted_path(change, message):
    found = refusal(MINIMAL | change)
    assert found.startswith(f"run.yaml: {message}")
    assert "\n" not in found


def test_a_section_that_is_no_section_is_refused():
    assert refusal(MINIMAL | {"optim": 5}).startswith("run.yaml: optim: ")
    assert refusal(MINIMAL | {"shape": 5}).startswith("run.yaml: shape: ")


def test_all_problems_are_said_at_once():
    values = {
        "stepz": 3,
        "shape": {"kind": "blob"},
        "optim": {"lr": "x", "warmup": "x"},
        "parts": [{"path": 1}, {}],
    }
    assert refusal(values).splitlines()[0] == "run.yaml: 7 problems"
    paths = {line.split(":")[0].strip() for line in refusal(values).splitlines()[1:]}
    assert paths == {"stepz", "name", "shape.kind", "optim.lr", "optim.warmup", "parts[0].path", "parts[1].path"}


def test_a_date_is_refused_with_advice():
    import datetime

    assert "Put it in quotes" in refusal(MINIMAL | {"name": datetime.date(2024, 1, 1)})


def test_an_imported_module_adds_a_kind(tmp_path, monkeypatch):
    source = (
        "from typing import Literal\n"
        "from franca.core.config import config\n"
        f"from {ShapeConfig.__module__} import ShapeConfig\n"
        "@config\nclass Star(ShapeConfig):\n    kind: Literal['star']\n    points: int = 5\n"
    )
    write(tmp_path, "a_users_own_shape.py", source)
    monkeypatch.syspath_prepend(tmp_path)
    values = {"name": "x", "shape": {"kind": "star", "points": 6}}
    assert "'star' is not one of circle, square" in refusal(values)
    try:
        made = check(AppConfig, values | {"imports": ["a_users_own_shape"]}, "run.yaml")
        assert (made.shape.kind, made.shape.points) == ("star", 6)
    finally:
        ShapeConfig.members.pop("star", None)


def test_a_choice_of_one_needs_no_other_to_be_known():
    class Only(Choice):
        pass

    @config
    class OneConfig(Only):
        kind: Literal["one"] = "one"
        size: int = 1

    @config
    class Holder:
        only: Only = OneConfig()

    assert check(Holder, {"only": {"size": 4}}, "x").only == OneConfig(size=4)
    assert refusal({"only": {"siez": 4}}, Holder) == "run.yaml: only.siez: unknown key (did you mean 'size'?)"
    assert "only.kind: 'two' is not one of 'one'" in refusal({"only": {"kind": "two"}}, Holder)


# PyYAML loses Unicode's rare line breaks in quotes, and `$` may begin an interpolation.
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029$"), max_size=8)
SHAPES = st.one_of(
    st.builds(CircleConfig, kind=st.just("circle"), radius=st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(SquareConfig, kind=st.just("square"), corners=st.sampled_from(["sharp", "round"])),
)
DURATIONS = st.one_of(
    st.builds(Duration, st.integers(0, 10**13), st.sampled_from(["steps", "samples", "tokens", "seconds", "epochs"])),
    st.builds(Duration, st.sampled_from([0.5, 1e-5, 0.1, 2.75]), st.sampled_from(["seconds", "epochs"])),
)
PARTS = st.lists(st.builds(PartConfig, path=NAMES, weight=st.none() | st.floats(0.1, 1e30)), max_size=3).map(tuple)
OPTIMS = st.builds(OptimConfig, lr=st.floats(1e-12, 1e12), warmup=DURATIONS)
APPS = st.builds(AppConfig, name=NAMES, shape=SHAPES, optim=OPTIMS, parts=PARTS, second=st.none() | OPTIMS)


@PROPERTY
@given(app=APPS)
def test_a_config_written_as_yaml_is_the_same_config_again(tmp_path_factory, app):
    path = write(tmp_path_factory.getbasetemp(), "round_trip.yaml", to_yaml(app))
    assert load(AppConfig, path) == app
    assert check(AppConfig, to_dict(app), "x") == app
    assert differences(to_dict(app), to_dict(load(AppConfig, path))) == []


@pytest.mark.parametrize("text", ["${x}", "a ${b.c} d", "${", "$5", "${oc.env:HOME} é", '"${q}"\n'])
def test_a_literal_interpolation_in_a_text_is_that_text_again(tmp_path, text):
    app = check(AppConfig, MINIMAL | {"name": text, "parts": [{"path": text}]}, "x")
    assert load(AppConfig, write(tmp_path, "again.yaml", to_yaml(app))) == app


def test_yaml_keeps_the_order_of_the_fields():
    keys = [line.split(":")[0] for line in to_yaml(check(AppConfig, MINIMAL, "x")).splitlines() if line[0].isalpha()]
    assert keys == ["name", "shape", "optim", "second", "parts", "named", "steps", "fast", "imports"]


def test_differences_are_dotted_paths_with_both_values():
    old = {"a": 1, "b": {"x": 1, "y": [1, 2], "same": 0}, "gone": 3}
    new = {"a": 2, "b": {"x": 1, "y": [1], "same": 0, "new": None}, "c": {"d": 1}}
    assert differences(old, new) == [("a", 1, 2), ("b.y", [1, 2], [1]), ("gone", 3, None), ("c", None, {"d": 1})]
    assert differences(old, old) == []


def test_later_checks_speak_the_same_way():
    assert str(problems_error("run.yaml", ["a: is wrong"])) == "run.yaml: a: is wrong"
    assert str(problems_error("run.yaml", ["a: x", "b: y"])) == "run.yaml: 2 problems\n  a: x\n  b: y"


def test_modules_are_imported_only_for_a_section_that_has_imports(tmp_path, monkeypatch):
    (tmp_path / "franca_trap.py").write_text("raise SystemExit('was imported')")
    monkeypatch.syspath_prepend(tmp_path)

    @config
    class Plain:
        size: int = 1

    with pytest.raises(ConfigError, match="imports: unknown key"):
        check(Plain, {"imports": ["franca_trap"]}, "params.json")
