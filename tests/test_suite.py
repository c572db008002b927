"""Suites: what a file asks for, and one sentence with file and line for what it must not."""

from pathlib import Path

import pytest

from gradiometer.bench import suite as suites
from gradiometer.bench.complaints import line_of
from gradiometer.bench.errors import RequestError

HEAD = """title = "Two blocks"

[[gradient]]
problems = ["gaussian-toy:units=2"]
estimators = ["iwae:K=2"]
replicates = 16

[[gradient]]
"""  # the second block begins on line 8, its keys on line 9


def read(tmp_path: Path, text: str, *settings: str) -> suites.Suite:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return suites.read(str(path), settings)[1]


def complaint(tmp_path: Path, text: str, *settings: str) -> str:
    with pytest.raises(RequestError) as refused:
        read(tmp_path, text, *settings)
    said = str(refused.value)
    assert "\n" not in said
    return said.replace(str(tmp_path / "mine.toml"), "mine.toml")


TOY = 'problems = ["gaussian-toy"]\nestimators = ["iwae"]\n'


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (TOY + 'replicates = "16"', "line 11: gradient.1.replicates: should be a whole number, not '16'"),
        (
            TOY + 'metrics = ["test_elbo"]',
            "test_elbo is no metric of a gradient: it is measured by a [[training]] block",
        ),
        (
            TOY + 'metrics = ["snr", "peak_memory"]',
            "peak_memory is no metric of a gradient: it is measured by a [[cost]]",
        ),
        (TOY + "replicates = 3", "line 11: gradient.1.replicates: should be at least 4, not 3"),
        (TOY + "replicates = -8", "line 11: gradient.1.replicates: should be at least 4, not -8"),
        (TOY + "replicates = nan", "line 11: gradient.1.replicates: should be a whole number, not nan"),
        (TOY + "batch = 1.0", "line 11: gradient.1.batch: should be a whole number, not 1.0"),
        (TOY + "batch = true", "line 11: gradient.1.batch: should be a whole number, not True"),
        (TOY + "time_limit = inf", "line 11: gradient.1.time_limit: should be a finite number, not inf"),
        (TOY + "time_limit = nan", "line 11: gradient.1.time_limit: should be a finite number, not nan"),
        (TOY + "time_limit = 0", "line 11: gradient.1.time_limit: should be more than 0, not 0"),
        (TOY + "K = [0]", "line 11: gradient.1.K.0: should be at least 1, not 0"),
        (TOY + "K = []", "line 11: gradient.1.K: should not be empty"),
        (TOY + "K = 4", "line 11: gradient.1.K: should be a list, in square brackets, not 4"),
        (TOY + "K = [\n  2,\n  0,\n]", "line 13: gradient.1.K.1: should be at least 1, not 0"),
        (TOY + 'K = [\n  2,\n  "x",\n]', "line 13: gradient.1.K.1: should be a whole number, not 'x'"),
        (TOY + "replicats = 8", "line 11: gradient.1.replicats: unknown key; did you mean 'replicates'?"),
        (TOY + 'dtype = "half"', "line 11: gradient.1.dtype: should be 'float32' or 'float64', not 'half'"),
        (
            TOY + 'precision = "lots"',
            "line 11: gradient.1.precision: should be a part of the value, as in 5% or 0.05, not 'lots'",
        ),
        (TOY + "precision = 5", "line 11: gradient.1.precision: should be less than 1, not 5"),
        (
            TOY + 'memory = "2XB"',
            "line 11: gradient.1.memory: should be an amount of memory, as in 2GB or 512MiB, not '2XB'",
        ),
        (
            TOY + 'metrics = ["varience"]',
            "line 11: gradient.1.metrics.0: unknown metric 'varience'; did you mean 'variance'?",
        ),
        (
            TOY + 'engine = "fast"',
            "line 11: gradient.1.engine: should be 'auto', 'rows', 'ghost' or 'loop', not 'fast'",
        ),
        (TOY + "minibatches = 3", "line 11: gradient.1.minibatches: should be at least 4, not 3"),
        (TOY + 'minibatches = "all"', "line 11: gradient.1.minibatches: should be a whole number, not 'all'"),
        (TOY + "tensors = 1", "line 11: gradient.1.tensors: should be true or false, not 1"),
        (
            TOY + 'minibatches = 8\nmetrics = ["variance", "snr"]',
            "line 8: gradient.1: the metric snr goes with one minibatch: leave it out, or minibatches",
        ),
        (
            TOY + "minibatches = 8\ntensors = true",
            "line 8: gradient.1: tensors goes with one minibatch: leave it out, or minibatches",
        ),
        (TOY + 'minibatches = 8\nprecision = "5%"', "line 8: gradient.1: precision goes with one minibatch"),
        (TOY + "budget = 99", "a budget is what a precision may take: give precision, too"),
        (TOY + 'reference = "drge"', "line 11: gradient.1.reference: unknown estimator 'drge'; did you mean 'dreg'?"),
        ('problems = ["gaussian-toy"]', "line 8: gradient.1.estimators: this key is missing"),
        ('problems = []\nestimators = ["iwae"]', "line 9: gradient.1.problems: should not be empty"),
        (
            'problems = "gaussian-toy"\nestimators = ["iwae"]',
            "line 9: gradient.1.problems: should be a list, in square brackets, not 'gaussian-toy'",
        ),
        ('problems = ["gaussian-toy", 3]', "line 9: gradient.1.problems.1: should be text, in quotes, not 3"),
        (
            'problems = [\n  "gaussian-toy",\n  "gausian-toy",\n]\nestimators = ["iwae"]',
            "line 11: gradient.1.problems.1: unknown problem 'gausian-toy'; did you mean 'gaussian-toy'?",
        ),
        (
            'problems = ["digits-vae@lat"]\nestimators = ["iwae"]',
            "line 9: gradient.1.problems.0: digits-vae has no snapshot 'lat'; did you mean 'late'?",
        ),
        (
            'problems = ["gaussian-toy"]\nestimators = [\n  "iwae",\n  # "dreg",\n  "drge",\n]\nreplicates = 8',
            "line 13: unknown estimator 'drge'; did you mean 'dreg'?",
        ),
        ('problems = ["gaussian-toy"]\nestimators = ["rloo:K=1"]', "line 10: rloo needs K >= 2, not K=1"),
        (
            'problems = ["gaussian-toy"]\nestimators = [\n"iwae",\n"rloo"]\nK = [1]',
            "line 12: rloo needs K >= 2, not K=1",
        ),
        (
            'problems = ["gaussian-toy"]\nestimators = ["rloo:K=3"]\nK = [4]',
            "line 8: gradient.1: K is given twice: by the key K and by the word 'rloo:K=3'",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_line(tmp_path: Path, block: str, said: str) -> None:
    assert said in complaint(tmp_path, HEAD + block + "\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mine.toml, line 1: title: this key is missing"),
        ('title = "t"\n', "mine.toml asks for nothing: add a [[gradient]], [[training]] or [[cost]] block"),
        ('title = "t\n', "mine.toml is not TOML: Illegal character '\\n' (at line 1, column 11)"),
        ("title = 3\n", "mine.toml, line 1: title: should be text, in quotes, not 3"),
        ('seed = -1\ntitle = "t"\n', "mine.toml, line 1: seed: should be at least 0, not -1"),
        ('title = "t"\nseed = 1.5\n', "mine.toml, line 2: seed: should be a whole number, not 1.5"),
        (f'title = "t"\nseed = {10**30}\n', "line 2: seed: should be less than 4294967296"),
        ('title = "t"\nthreads = 0\n', "line 2: threads: should be at least 1, not 0"),
        ('title = "t"\n[gradient]\n', "line 2: gradient: should be a block: write [[gradient]] on a line of its own"),
        ('title = "t"\ngradient = [3]\n', "line 2: gradient.0: should be a block: write [[gradient]]"),
        ('title = "t"\n\n[[gradeint]]\n', "line 3: gradeint: unknown key; did you mean 'gradient'?"),
        (
            'title = "t"\n[[training]]\nproblems = ["digits-vae@late"]\nestimators = ["stl"]\nsteps = 1\nevery = 1\n',
            "line 3: training.0.problems.0: no VAE to train is called 'digits-vae@late'; did you mean 'digits-vae'?",
        ),
        (
            'title = "t"\n[[training]]\nproblems = ["digits-vae"]\nestimators = ["stl"]\nsteps = 1\n',
            "line 2: training.0.every: this key is missing",
        ),
        (
            'title = "t"\n[[cost]]\nproblems = ["gaussian-toy"]\nestimators = ["stl"]\nseconds = inf\n',
            "line 5: cost.0.seconds: should be a finite number, not inf",
        ),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, text: str, said: str) -> None:
    assert said in complaint(tmp_path, text)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    said = complaint(tmp_path, HEAD + TOY + "replicates = 1\nbatch = 0\n")
    assert "line 11: gradient.1.replicates" in said
    assert "line 12: gradient.1.batch" in said


@pytest.mark.parametrize("content", [b"\xff\xfe\x00\x01", b'title = "\xe9"\n', b"\x00" * 64, b"PK\x03\x04\x80"])
def test_a_file_that_is_no_text_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(RequestError, match=r"mine\.toml is not TOML: "):
        suites.read(str(path))


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xef\xbb\xbf" + (HEAD + TOY).encode())
    assert suites.read(str(path))[1].title == "Two blocks"


@pytest.mark.parametrize("word", ["nowhere.toml", ".", ".toml"])
def test_a_file_that_is_not_there_is_refused(word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"no suite file|unknown suite"):
        suites.read(word)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("replicates", "--set replicates should read key=value, as in --set replicates=256"),
        ("replicats=8", "--set: no key 'replicats'; did you mean 'replicates'?"),
        ("gradient=3", "--set: no key 'gradient'; known: title"),
        ("=8", "--set: no key ''; known: title"),
        ("steps=3", "--set steps: no block of this suite has such a key"),
        ("replicates=", "--set replicates: should be a whole number, not ''"),
        ("replicates=many", "--set replicates: should be a whole number, not 'many'"),
        ("replicates=3", "--set replicates: should be at least 4, not 3"),
        ("replicates=8=9", "--set replicates: should be a whole number, not '8=9'"),
        ("batch=nan", "--set batch: should be a whole number, not nan"),
        ("K=4", "--set K: should be a list, in square brackets, not 4"),
        ("estimators=['drge']", "--set estimators: unknown estimator 'drge'; did you mean 'dreg'?"),
        ("problems=['toy']", "--set problems: unknown problem 'toy'"),
    ],
)
def test_a_wrong_setting_is_the_command_lines_not_the_files(tmp_path: Path, setting: str, said: str) -> None:
    found = complaint(tmp_path, HEAD + TOY, setting)
    assert found.startswith(said)
    assert "mine.toml" not in found


def test_a_setting_reaches_every_block_that_has_the_key(tmp_path: Path) -> None:
    cost = '[[cost]]\nproblems = ["gaussian-toy"]\nestimators = ["iwae"]\n'
    suite = read(tmp_path, HEAD + TOY + cost, "replicates=8", "batch = 3", "seed=7", "dtype=float64", "title=other")
    assert [b.replicates for b in suite.gradient] == [8, 8]
    assert [b.batch for b in (*suite.gradient, *suite.cost)] == [3, 3, 3]
    assert (suite.seed, suite.title, suite.gradient[1].dtype) == (7, "other", "float64")


def test_amounts_are_read_as_people_write_them(tmp_path: Path) -> None:
    text = HEAD + TOY + 'precision = "5%"\nbudget = 4096\nmemory = "512MiB"\nmetrics = ["variance"]\n'
    first, *others = [cell for cell, _ in read(tmp_path, text).cells()]
    assert (first.precision, first.budget, first.metrics) == (None, None, ())
    assert [(c.precision, c.budget, c.memory, c.metrics) for c in others] == [(0.05, 4096, 2**29, ("variance",))]
    (changed, *_), _ = zip(*read(tmp_path, HEAD + TOY, "precision=0.1", "memory=3GB").cells(), strict=True)
    assert (changed.precision, changed.memory) == (0.1, 3 * 10**9)


def test_minibatches_make_cells_of_their_own_beside_the_ordinary_ones(tmp_path: Path) -> None:
    text = HEAD.replace("replicates = 16", "tensors = true") + TOY.replace("toy", "toy:units=2").replace(
        "iwae", "iwae:K=2"
    )
    one, over = (cell for cell, _ in read(tmp_path, text + "minibatches = 32\n").cells())
    assert (one.replicates, one.minibatches, one.tensors) == (1024, 0, True)
    assert (over.replicates, over.minibatches, over.tensors) == (64, 32, False)
    assert one.key != over.key
    assert str(over) == "gradient of iwae:K=2 on gaussian-toy:units=2 over 32 minibatches"
    (given,) = (cell for cell, _ in read(tmp_path, text, "minibatches=8", "replicates=12", "tensors=false").cells())
    assert (given.replicates, given.minibatches) == (12, 8)


def test_a_grid_is_every_problem_with_every_estimator_at_every_k(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        'title = "t"\nseed = 5\n[[gradient]]\nproblems = ["gaussian-toy", "bernoulli-toy"]\n'
        'estimators = ["reinforce", "moving-average:decay=0.5"]\nK = [1, 2]\ntime_limit = 9\n',
    )
    cells = suite.cells()
    words = ["reinforce", "moving-average:decay=0.5", "reinforce:K=2", "moving-average:K=2,decay=0.5"]
    assert [(c.problem, c.estimator) for c, _ in cells] == [
        (problem, word) for problem in ("gaussian-toy", "bernoulli-toy") for word in words
    ]
    assert {(c.seed, c.batch, c.replicates, limit) for c, limit in cells} == {(5, 20, 1024, 9)}


def test_training_is_one_cell_per_seed_counted_from_the_suites(tmp_path: Path) -> None:
    suite = read(
        tmp_path,
        'title = "t"\nseed = 5\n[[training]]\nproblems = ["digits-vae"]\nestimators = ["stl"]\nseeds = [0, 2]\nsteps = 3\n'
        "every = 1\n",
    )
    assert [(c.kind, c.seed, c.batch, c.steps) for c, _ in suite.cells()] == [
        ("training", 5, 100, 3),
        ("training", 7, 100, 3),
    ]


def test_a_cell_asked_for_twice_is_one_and_words_are_canonical(tmp_path: Path) -> None:
    twice = (
        HEAD
        + 'problems = ["gaussian-toy:units=2"]\nestimators = ["iwae:K=02", "iwae:K=2", "stl:K=1"]\nreplicates = 16\n'
    )
    assert [c.estimator for c, _ in read(tmp_path, twice).cells()] == ["iwae:K=2", "stl"]


@pytest.mark.parametrize(
    ("only", "words"), [("iwae*", ["iwae:K=2", "iwae:K=8"]), ("*units=2", ["iwae:K=2"]), ("none", [])]
)
def test_only_keeps_what_matches(tmp_path: Path, only: str, words: list[str]) -> None:
    suite = read(tmp_path, HEAD + 'problems = ["gaussian-toy"]\nestimators = ["iwae", "stl"]\n')
    assert [c.estimator for c, _ in suite.cells(only=only)] == words


@pytest.mark.parametrize("name", suites.names())
def test_suites_of_ours_are_valid_and_say_what_they_are(name: str) -> None:
    found, suite = suites.read(name)
    assert found == name
    assert suite.description
    assert len(suite.cells()) > 10


def test_headers_and_keys_are_found_however_they_are_written() -> None:
    text = "[[ gradient ]]  # first\nK = [1]\n[[gradient]]\nmatrix = [\n  [1, 2],\n]\nK= [2]\n[[cost]]\nK = [3]\n"
    assert line_of(("gradient", 0, "K"), text) == 2
    assert line_of(("gradient", 1, "K"), text) == 7
    assert line_of(("cost", 0, "K"), text) == 9
    assert line_of(("cost", 0, "problems"), text) == 8
