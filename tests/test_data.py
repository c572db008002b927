"""Data sets: published facts, the same bits for ever, and a clear sentence for every file that is not right."""

import gzip
import hashlib
import io
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import savemat

from gradiometer.bench.data import NAMES, binarize, describe, download, fetch, files, load, loaders, readers
from gradiometer.bench.data.catalogue import EITHER, ENTRIES
from gradiometer.bench.data.entry import Entry, File, Source
from gradiometer.bench.data.registry import candidates
from gradiometer.bench.errors import RequestError

REAL = Path(os.environ.get("GRADIOMETER_DATA") or Path(__file__).parents[2] / "shared" / "data")
Server = tuple[str, dict[str, tuple[int, int, bytes]]]  # its address; its pages by path: status, length, content
UNREACHABLE = "http://127.0.0.1:9"  # the discard port: nobody listens


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, no user's folder, and nothing remembered from another test."""
    monkeypatch.delenv("GRADIOMETER_DATA", raising=False)
    monkeypatch.setattr(files, "cache_folder", lambda: tmp_path / "cache")
    loaders._load.cache_clear()
    yield tmp_path / "cache"
    loaders._load.cache_clear()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of the user's."""
    place = tmp_path / "folder"
    place.mkdir()
    monkeypatch.setenv("GRADIOMETER_DATA", str(place))
    return place


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The real files."""
    if not (REAL / "mnist").is_dir():
        pytest.skip(f"no data sets in {REAL}: set GRADIOMETER_DATA to a folder that has them")
    monkeypatch.setenv("GRADIOMETER_DATA", str(REAL))
    return REAL


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on loopback that sends what it is told to."""
    pages: dict[str, tuple[int, int, bytes]] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, length, content = pages.get(self.path, (404, 0, b""))
            self.send_response(status)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", pages
        running.shutdown()
        thread.join()


def page(content: bytes) -> tuple[int, int, bytes]:
    return 200, len(content), content


def toy_content() -> bytes:
    """A tiny data set in the packed format: 3 / 2 / 1 images."""
    bits = np.random.RandomState(1).randint(0, 256, (6, 98)).astype(np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, train=bits[:3], valid=bits[3:5], test=bits[5:])
    return buffer.getvalue()


TOY = toy_content()


def toy(monkeypatch: pytest.MonkeyPatch, *urls: str, name: str = "toy", content: bytes = TOY) -> Entry:
    """Put a data set of one small file into the catalogue."""
    source = Source("packed", (File(f"{name}/{name}.npz", f"sha256:{sha256(content)}", urls),))
    entry = Entry(name, "a toy", (28, 28), (3, 2, 1), ("dynamic", "static", "none"), (source,), "none", "nobody")
    monkeypatch.setitem(ENTRIES, name, entry)
    return entry


def put(folder: Path, path: str, content: bytes) -> Path:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(content)
    return folder / path


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# --- what the data sets are -------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_split_once_and_for_all() -> None:
    from sklearn.datasets import load_digits

    digits = load("digits")
    assert [split.shape for split in (digits.train, digits.valid, digits.test)] == [(1297, 64), (250, 64), (250, 64)]
    assert digits.train.dtype == torch.float32
    rows = [{tuple(row) for row in (split * 16).int().tolist()} for split in (digits.train, digits.valid, digits.test)]
    theirs = Counter(tuple(row) for row in load_digits().data.astype(int).tolist())
    assert max(theirs.values()) == 1  # no image is there twice, so sets lose nothing
    assert set.union(*rows) == set(theirs)
    assert sum(len(part) for part in rows) == 1797  # disjoint
    # If this fails, the split has changed: raise `Entry.preparation`, or old results are taken for new ones.
    levels = (digits.train * 16).byte().numpy().tobytes()
    assert sha256(levels) == "16248e24bcfd55e023d9d4a88a999090921829f67b8357bae53cc5a4628304e1"


@pytest.mark.parametrize(
    ("name", "mean", "deviation"), [("mnist", 0.130660, 0.308108), ("fashion-mnist", 0.286041, 0.353024)]
)
def test_idx_data_sets_have_their_published_moments(real: Path, name: str, mean: float, deviation: float) -> None:
    data = load(name)
    assert [split.shape for split in (data.train, data.valid, data.test)] == [(50_000, 784)] + [(10_000, 784)] * 2
    training = torch.cat([data.train, data.valid])
    assert training.double().mean().item() == pytest.approx(mean, abs=1e-6)
    assert training.double().std().item() == pytest.approx(deviation, abs=1e-6)
    assert (training.min().item(), training.max().item()) == (0, 1)
    folder = name.replace("-", "_")
    raw = gzip.decompress((real / folder / "train-images-idx3-ubyte.gz").read_bytes())
    last = np.frombuffer(raw[-784:], np.uint8)  # the last training image is the last that validates, row by row
    assert np.array_equal((data.valid[-1] * 255).round().byte().numpy(), last)
    assert data.binarization == "dynamic"
    assert data.shape == (28, 28)


def test_binarized_mnist_is_the_canonical_text_from_any_of_its_files(
    real: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIOMETER_DATA", str(real))
    packed = load("binarized-mnist")
    canonical = {
        "train": "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d",
        "valid": "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2",
        "test": "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c",
    }
    monkeypatch.setenv("GRADIOMETER_DATA", str(folder))
    for split, expected in canonical.items():
        bits = getattr(packed, split).byte().numpy()
        text = np.full((len(bits), 1568), ord(" "), np.uint8)
        text[:, 0::2] = bits + ord("0")
        text[:, -1] = ord("\n")
        assert sha256(text.tobytes()) == expected
        put(
            folder, f"binarized_mnist/binarized_mnist_{split}.amat.gz", gzip.compress(text.tobytes(), 1)
        )  # not their gzip
    assert {located.path.suffix for located in fetch("binarized-mnist")} == {".gz"}
    zipped = load("binarized-mnist")
    assert zipped is not packed
    assert zipped.checksum == packed.checksum  # the same bits are the same data set, whichever file held them
    for path in leftovers(folder):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    plain = load("binarized-mnist")
    assert plain is not zipped
    for data in (zipped, plain):
        assert all(torch.equal(getattr(data, split), getattr(packed, split)) for split in canonical)
    assert (packed.binarization, len(packed.train), len(packed.valid), len(packed.test)) == (
        "static",
        50_000,
        10_000,
        10_000,
    )


def test_omniglot_from_the_drawings_is_the_documented_stand_in_and_says_so(real: Path) -> None:
    parts, tested = [], []
    for part in ("background", "evaluation"):
        with np.load(real / "omniglot" / f"images_{part}.npz") as arrays:
            grey = readers.area_average(~arrays["images"])
        parts.append(grey.tobytes())
        tested.append(grey[:, 15:].reshape(-1, 784))
    assert sha256(b"".join(parts)) == "32b17fc95e1d2df254bab2e046f2d1f27d5d86c76ef550090a2add48aa21150d"
    data = load("omniglot")
    assert [len(split) for split in (data.train, data.valid, data.test)] == [23_000, 1_345, 8_115]
    assert np.array_equal((data.test * 255).round().byte().numpy(), np.concatenate(tested))
    assert data.name == "omniglot-area28"
    assert "NOT comparable with published Omniglot results" in str(data)
    assert load(data.name) is data  # its own name leads back to it
    kept = [row.tobytes() for split in (data.train, data.valid) for row in (split * 255).round().byte().numpy()]
    everything = b"".join(parts)
    rest = Counter(everything[i : i + 784] for i in range(0, len(everything), 784))
    rest.subtract(row.tobytes() for row in np.concatenate(tested))
    assert Counter(kept) == rest


def test_area_average_is_the_share_of_ink() -> None:
    ink = np.random.RandomState(0).random_sample((3, 105, 105)) < np.linspace(0, 0.7, 105)  # more ink to the right
    blocks = ink.repeat(4, 1).repeat(4, 2).reshape(3, 28, 15, 28, 15).mean((2, 4))
    assert np.abs(readers.area_average(ink) - 255 * blocks).max() <= 0.5


def test_omniglot_prefers_burdas_version(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.RandomState(0)
    images = rng.random_sample((1_350, 28, 28))  # row, column
    buffer = io.BytesIO()
    columns = images.transpose(0, 2, 1).reshape(-1, 784).T  # MATLAB's order: pixels run down the columns
    savemat(buffer, {"data": columns[:, :1_347], "testdata": columns[:, 1_347:]})
    content = buffer.getvalue()
    burda = ENTRIES["omniglot-burda"]
    file = replace(burda.sources[0].files[0], digest=f"git-blob:{files.digest('git-blob', content)}")
    monkeypatch.setitem(ENTRIES, burda.name, replace(burda, sources=(replace(burda.sources[0], files=(file,)),)))
    drawings = [put(folder, located.path, b"never read") for located in ENTRIES["omniglot-area28"].sources[0].files]
    put(cache, file.path, content)
    data = load("omniglot")
    assert data.name == "omniglot-burda"
    assert torch.equal(data.test, torch.tensor(images[1_347:], dtype=torch.float32).flatten(1))
    assert (len(data.train), len(data.valid)) == (2, 1_345)
    seen = {tuple(row) for row in torch.cat([data.train, data.valid]).tolist()}
    assert seen == {tuple(row) for row in images[:1_347].astype(np.float32).reshape(-1, 784).tolist()}
    (cache / file.path).unlink()
    # The drawings at hand go before a download, and a damaged one is reported rather than passed over.
    with pytest.raises(RequestError, match=str(drawings[0])):
        load("omniglot")


def test_git_blob_digest_is_gits() -> None:
    assert files.digest("git-blob", b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert files.digest("git-blob", b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_sizes_in_the_catalogue_are_true(real: Path) -> None:
    for name in NAMES:
        if name not in ("omniglot", "omniglot-burda"):
            data = load(name)
            assert tuple(len(split) for split in (data.train, data.valid, data.test)) == ENTRIES[name].sizes
            assert data.train.shape[1] == data.shape[0] * data.shape[1]
            assert data.binarization == ENTRIES[name].modes[0]


# --- binarization -----------------------------------------------------------------------------------------------------


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_binarize_draws_each_pixel_with_its_probability_and_repeats_itself() -> None:
    x = torch.tensor([0.0, 0.1, 0.7, 1.0]).expand(20_000, 4)
    bits = binarize(x, seeded(0))
    assert torch.equal(bits, binarize(x, seeded(0)))
    assert not torch.equal(bits, binarize(x, seeded(1)))
    assert torch.equal(bits, binarize(x.double(), seeded(0)).float())
    mean, error = bits.mean(0), (x[0] * (1 - x[0]) / len(x)).sqrt()
    assert ((mean - x[0]).abs() <= 5 * error).all()  # exact where the probability is 0 or 1
    assert (bits.dtype, bits.shape, sorted(bits.unique().tolist())) == (torch.float32, x.shape, [0, 1])
    assert binarize(x[:0], seeded(0)).shape == (0, 4)


@pytest.mark.parametrize("wrong", [255.0, -0.1, float("nan")])
def test_binarize_refuses_what_is_no_probability(wrong: float) -> None:
    with pytest.raises(ValueError, match="binarize wants probabilities"):
        binarize(torch.tensor([0.5, wrong]), seeded(0))


def test_batch_is_a_fresh_draw_the_same_bits_or_grey_levels() -> None:
    indices = torch.tensor([5, 0, 5])
    dynamic, static, grey = load("digits"), load("digits", "static"), load("digits", "none")
    generator = seeded(0)
    first, second = dynamic.batch(indices, generator), dynamic.batch(indices, generator)
    assert not torch.equal(first, second)
    assert not torch.equal(first[0], first[2])  # every visit is a draw of its own
    assert torch.equal(first, dynamic.batch(indices, seeded(0)))
    assert torch.equal(first, binarize(grey.train[indices], seeded(0)))
    state = generator.get_state()
    assert torch.equal(static.batch(indices, generator), static.train[indices])
    assert torch.equal(grey.batch(indices, generator), grey.train[indices])
    assert torch.equal(generator.get_state(), state)  # no noise is spent where none is needed
    assert torch.equal(grey.batch(indices, seeded(0), "test"), grey.test[indices])
    assert torch.equal(grey.batch(indices, seeded(0), "valid"), grey.valid[indices])


def test_static_is_one_draw_for_ever() -> None:
    static, grey = load("digits", "static"), load("digits", "none")
    loaders._load.cache_clear()
    assert torch.equal(static.train, load("digits", "static").train)
    for split in ("train", "valid", "test"):
        bits, levels = getattr(static, split), getattr(grey, split)
        assert bits.unique().tolist() == [0, 1]
        assert not bits[levels == 0].any()
        assert bits[levels == 1].all()
        error = (levels * (1 - levels)).sum().sqrt() / levels.numel()
        assert abs(bits.mean() - levels.mean()) < 5 * error  # a Bernoulli draw: a threshold would be far off
    assert not torch.equal(static.valid, (static.train[:250]))
    # If this fails, the fixed draw has changed: raise `Entry.preparation`.
    bits = static.train.byte().numpy().tobytes()
    assert sha256(bits) == "3938408ff7577861ff623bbcff576c7daad6edd8c9e8cf3cdc57185e30003fe7"


def test_checksum_tells_apart_whatever_changes_the_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checksum(entry: Entry, binarization: str | None = None, content: bytes = TOY) -> str:
        put(folder, entry.sources[0].files[0].path, content)
        return load(entry.name, binarization).checksum

    first = checksum(toy(monkeypatch))
    assert first == checksum(toy(monkeypatch))
    other = toy(monkeypatch, name="other")
    buffer = io.BytesIO()
    np.savez(
        buffer, train=np.zeros((3, 98), np.uint8), valid=np.zeros((2, 98), np.uint8), test=np.zeros((1, 98), np.uint8)
    )
    zeros = buffer.getvalue()
    different = {first, checksum(other), checksum(other, "static"), checksum(other, "none")}
    different.add(checksum(toy(monkeypatch, content=zeros), content=zeros))
    monkeypatch.setitem(ENTRIES, "other", replace(other, preparation=2))
    different.add(checksum(ENTRIES["other"]))
    assert len(different) == 6
    assert all(len(key) == 64 for key in different)


# --- wrong words ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "binarization", "sentence"),
    [
        ("mnits", None, "unknown data set 'mnits'; did you mean 'mnist'?"),
        ("Fashion_MNIST", None, "unknown data set 'Fashion_MNIST'; did you mean 'fashion-mnist'?"),
        ("zzz", None, f"unknown data set 'zzz'; known: {', '.join(NAMES)}"),
        ("digits", "dynamics", "data set digits has no binarization 'dynamics'; did you mean 'dynamic'?"),
        ("digits", "zzz", "data set digits has no binarization 'zzz'; known: dynamic, static, none"),
        ("binarized-mnist", "dynamic", "data set binarized-mnist has no binarization 'dynamic'; it is static already"),
    ],
)
def test_a_wrong_word_is_answered_with_the_nearest(name: str, binarization: str | None, sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        load(name, binarization)
    assert str(caught.value) == sentence


def test_the_table_has_a_full_row_for_every_name() -> None:
    rows = describe()
    assert tuple(row["name"] for row in rows) == NAMES
    assert set(NAMES) == {*ENTRIES, *EITHER}
    assert all(row["summary"] and row["binarization"] and row["shape"] for row in rows)
    assert all(row["images"] and row["citation"] and row["licence"] for row in rows if row["name"] not in EITHER)
    assert [entry.name for entry in candidates("omniglot")] == ["omniglot-burda", "omniglot-area28"]


def test_listing_and_fetching_need_neither_torch_nor_scikit_learn() -> None:
    code = "import sys; from gradiometer.bench import data; data.describe(); data.fetch('digits'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "gradiometer.bench.data.files" in loaded
    assert not {"torch", "sklearn", "numpy"} & set(loaded)


# --- files that are missing or wrong ----------------------------------------------------------------------------------


def test_no_file_and_no_network_is_one_sentence(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(monkeypatch, f"{UNREACHABLE}/a", f"{UNREACHABLE}/b")
    refused = "[Errno 111] Connection refused"
    tail = (
        f"the download failed ({UNREACHABLE}/a: {refused}; {UNREACHABLE}/b: {refused}); put what is missing into a "
        "folder under that path and set the environment variable GRADIOMETER_DATA to the folder"
    )
    with pytest.raises(RequestError) as caught:
        load("toy")
    assert str(caught.value).replace("Errno 61", "Errno 111") == (
        f"data set toy: no toy/toy.npz in {folder} (GRADIOMETER_DATA) or {cache} (the cache), and {tail}"
    )
    monkeypatch.delenv("GRADIOMETER_DATA")
    with pytest.raises(RequestError) as caught:
        load("toy")
    assert str(caught.value).replace("Errno 61", "Errno 111") == (
        f"data set toy: no toy/toy.npz in {cache} (the cache) (GRADIOMETER_DATA is not set), and {tail}"
    )
    assert not leftovers(cache)


def test_all_the_ways_to_have_a_data_set_are_named_where_none_is_there(folder: Path, cache: Path) -> None:
    put(folder, "omniglot/images_background.npz", b"")
    with pytest.raises(RequestError) as caught:
        load("omniglot-area28")
    assert str(caught.value) == (
        f"data set omniglot-area28: no omniglot/images_evaluation.npz in {folder} (GRADIOMETER_DATA) or {cache} (the "
        "cache), and there is no address to download from; put what is missing into a folder under that path and set "
        "the environment variable GRADIOMETER_DATA to the folder"
    )


def test_a_folder_that_is_none_is_reported_where_files_are_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIOMETER_DATA", str(tmp_path / "typo"))
    assert len(load("digits").train) == 1297
    with pytest.raises(RequestError) as caught:
        load("mnist")
    assert (
        str(caught.value)
        == f"the environment variable GRADIOMETER_DATA names {tmp_path / 'typo'}, which is not a folder"
    )


@pytest.mark.parametrize(
    "damaged", [TOY[:-7], b"", TOY[:100] + b"!" + TOY[101:]], ids=["truncated", "empty", "flipped"]
)
def test_a_damaged_file_of_the_users_is_reported_and_left_alone(
    folder: Path, cache: Path, server: Server, damaged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pages = server
    pages["/toy"] = page(TOY)
    toy(monkeypatch, f"{base}/toy")
    path = put(folder, "toy/toy.npz", damaged)
    for attempt in (load, fetch):
        with pytest.raises(RequestError) as caught:
            attempt("toy")
        assert str(caught.value) == (
            f"{path} is damaged or another file: expected sha256 {sha256(TOY)}, found {sha256(damaged)}; "
            f"replace it with a good copy (such as {base}/toy), or remove it from your GRADIOMETER_DATA folder to have "
            "it found elsewhere"
        )
    assert path.read_bytes() == damaged
    assert not leftovers(cache)
    path.unlink()
    assert len(load("toy").train) == 3  # what the sentence advises works


def test_a_damaged_file_of_the_cache_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(monkeypatch, f"{UNREACHABLE}/toy")
    path = put(cache, "toy/toy.npz", TOY[1:])
    with pytest.raises(RequestError) as caught:
        load("toy")
    assert str(caught.value) == (
        f"{path} is damaged or another file: expected sha256 {sha256(TOY)}, found {sha256(TOY[1:])}; delete it to "
        "download it again"
    )


@pytest.mark.parametrize("cut", [0, 5, 20])
def test_a_damaged_gzip_is_reported(folder: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"0 1\n" * 100
    text = gzip.compress(content, mtime=0)[: -cut or None]
    entry = toy(monkeypatch)
    file = File("toy/toy.amat.gz", "sha256:" + sha256(b"1 0\n" * 100), unpacked=True)
    monkeypatch.setitem(ENTRIES, "toy", replace(entry, sources=(Source("amat", (file,)),)))
    path = put(folder, file.path, text)
    with pytest.raises(RequestError) as caught:
        load("toy")
    expected = f"expected {file.digest.replace(':', ' ')} of the decompressed content"
    remedy = "replace it with a good copy, or remove it from your GRADIOMETER_DATA folder to have it found elsewhere"
    if cut:
        what = f"is damaged: {expected}, found a file (sha256 {sha256(text)}) that does not decompress"
    else:
        what = f"is damaged or another file: {expected}, found {sha256(content)}"
    assert str(caught.value) == f"{path} {what}; {remedy}"


def test_a_file_that_cannot_be_read_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy(monkeypatch)
    path = put(folder, "toy/toy.npz", TOY)

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(RequestError) as caught:
        load("toy")
    assert str(caught.value) == f"{path} cannot be read: Permission denied"


def test_a_package_without_the_file_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None)
    with pytest.raises(RequestError) as caught:
        load("digits")
    assert str(caught.value) == (
        "data set digits is read from the package sklearn, which has no datasets/data/digits.csv.gz here: install it"
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not an IDX file of unsigned bytes: it begins with nothing"),
        (b"\0\0\x0d\x01\0\0\0\x01\0", "not an IDX file of unsigned bytes: it begins with 00 00 0d 01"),
        (b"\0\0\x08\x03\0\0\0\x02", "not an IDX file of unsigned bytes: it begins with 00 00 08 03"),
        (b"\0\0\x08\x02\0\0\0\x02\0\0\0\x03abcde", "an IDX file of shape (2, 3) should hold 6 bytes, not 5"),
        (b"\0\0\x08\x02\0\0\0\x02\0\0\0\x03abcdefg", "an IDX file of shape (2, 3) should hold 6 bytes, not 7"),
    ],
)
def test_an_idx_header_is_held_to_its_word(content: bytes, sentence: str) -> None:
    with pytest.raises(RequestError) as caught:
        readers.parse_idx(content)
    assert str(caught.value) == sentence


def test_an_idx_file_is_read_in_big_endian_and_c_order() -> None:
    assert readers.parse_idx(b"\0\0\x08\x02\0\0\0\x02\0\0\0\x03abcdef").tolist() == [[97, 98, 99], [100, 101, 102]]


# --- downloads --------------------------------------------------------------------------------------------------------


def test_the_users_folder_goes_before_the_cache_and_the_cache_before_a_download(
    folder: Path, cache: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pages = server
    pages["/toy"] = page(TOY)
    toy(monkeypatch, f"{base}/toy")
    (downloaded,) = fetch("toy")
    assert (downloaded.origin, downloaded.path) == (f"{base}/toy", cache / "toy/toy.npz")
    assert str(downloaded) == f"toy/toy.npz: {cache / 'toy/toy.npz'} (from {base}/toy)"
    assert downloaded.path.read_bytes() == TOY
    pages.clear()
    assert [located.origin for located in fetch("toy")] == ["the cache"]
    path = put(folder, "toy/toy.npz", TOY)
    assert [(located.origin, located.path) for located in fetch("toy")] == [("GRADIOMETER_DATA", path)]
    assert leftovers(folder) == [path]


def test_a_mirror_serves_what_the_first_addresses_do_not(
    cache: Path,
    tmp_path: Path,
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, pages = server
    pages["/other"], pages["/cut"] = page(b"<html>not found</html>"), (200, len(TOY), TOY[:-9])
    good = put(tmp_path, "mirror/toy.npz", TOY).as_uri()
    toy(monkeypatch, f"{base}/gone", "nonsense", f"{base}/other", f"{base}/cut", good)
    bits = np.unpackbits(np.load(io.BytesIO(TOY))["train"], axis=1)
    assert np.array_equal(load("toy").train.numpy(), bits)
    assert leftovers(cache) == [cache / "toy/toy.npz"]
    html = sha256(b"<html>not found</html>")
    assert capsys.readouterr().err.splitlines() == [
        f"toy/toy.npz: {base}/gone: HTTP Error 404: Not Found",
        "toy/toy.npz: nonsense: unknown url type: 'nonsense'",
        f"toy/toy.npz: downloading 22 bytes from {base}/other",
        f"toy/toy.npz: {base}/other: sent another file: expected sha256 {sha256(TOY)}, found {html}",
        f"toy/toy.npz: downloading {len(TOY):,} bytes from {base}/cut",
        f"toy/toy.npz: {base}/cut: the connection closed after {len(TOY) - 9:,} of {len(TOY):,} bytes",
        f"toy/toy.npz: downloading {len(TOY):,} bytes from {good}",
    ]


def test_a_silent_server_is_given_up(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        toy(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}/toy")
        with pytest.raises(RequestError, match="/toy: timed out"):
            fetch("toy", progress=False)
    assert not leftovers(cache)


@pytest.mark.parametrize("sent", [b"<html></html>", TOY[:-1]], ids=["another file", "cut short"])
def test_a_failed_download_leaves_nothing(
    cache: Path, server: Server, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, pages = server
    pages["/toy"] = page(sent)
    toy(monkeypatch, f"{base}/toy")
    with pytest.raises(RequestError, match=f"sent another file: expected sha256 {sha256(TOY)}, found {sha256(sent)}"):
        load("toy")
    assert not leftovers(cache)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupted"]
)
@pytest.mark.parametrize("step", ["write", "replace"])
def test_an_interrupted_write_leaves_nothing(
    cache: Path, tmp_path: Path, step: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy(monkeypatch, put(tmp_path, "mirror/toy.npz", TOY).as_uri())
    seen = []

    def fail(*_: object) -> int:
        seen.extend(leftovers(cache))
        raise error

    if step == "replace":
        monkeypatch.setattr(os, "replace", fail)
    else:
        make = Path.write_bytes

        def broken(self: Path, content: bytes) -> int:
            if self.parent.parent != cache:
                return make(self, content)
            make(self, content[:-1])
            return fail()

        monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(RequestError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        load("toy")
    if isinstance(error, OSError):
        assert str(caught.value) == f"the download {cache / 'toy/toy.npz'} cannot be written: No space left on device"
    assert len(seen) == 1  # a temporary file was there,
    assert seen[0].name != "toy.npz"  # under another name,
    assert not leftovers(cache)  # and is gone


def test_a_cache_that_cannot_be_written_is_reported(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_bytes(b"a file where the folder should be")
    toy(monkeypatch, put(tmp_path, "mirror/toy.npz", TOY).as_uri())
    with pytest.raises(RequestError, match=f"the download {cache / 'toy/toy.npz'} cannot be written: Not a directory"):
        load("toy")


def test_progress_is_a_bar_on_a_terminal_and_silent_where_not_wanted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    toy(monkeypatch, put(tmp_path, "mirror/toy.npz", TOY).as_uri())
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        fetch("toy")
    assert "toy/toy.npz" in terminal.getvalue()
    assert "━" in terminal.getvalue()
    (cache / "toy/toy.npz").unlink()
    fetch("toy", progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.undo()
    assert files.cache_folder().parts[-2:] == ("gradiometer", "data")
