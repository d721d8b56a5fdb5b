"""Files to documents to tokens to rows to batches: nothing is lost, doubled or mixed up."""

import json

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, strategies as st
from jax.sharding import AxisType

from ringjax import Ring, layouts
from ringjax.training.batch import Batch
from ringjax.training.corpus import ByteCodec, Corpus, TextCodec, open_codec, read_corpus, split
from ringjax.training.data import Batches, Placement, held_out_batches
from ringjax.training.packing import PackedRows, pack, pieces


def make_corpus(*documents) -> Corpus:
    offsets = np.cumsum([0, *map(len, documents)], dtype=np.int64)
    tokens = np.concatenate([np.asarray(document, np.int32) for document in documents])
    return Corpus(tokens=tokens, offsets=offsets, names=tuple(f"{i}" for i in range(len(documents))))


def random_corpus(rng, sizes) -> Corpus:
    return make_corpus(*(rng.integers(1, 250, size) for size in sizes))


def spans(row) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens, targets and positions of each segment of a row, in order."""
    row = Batch(*map(np.asarray, row))
    found = []
    for segment in range(1, row.segment_ids.max() + 1):
        here = row.segment_ids == segment
        real = here & (row.weights == 1)
        found.append((row.tokens[here].tolist(), row.targets[real].tolist(), row.positions[here].tolist()))
    return found


# Corpus


def test_documents_are_files_and_lines_in_the_order_of_paths(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.py").write_text("22")
    (tmp_path / "a.py").write_bytes(b"1\xff")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "x"}) + "\n\n" + json.dumps({"text": "é", "id": 1}))
    corpus = read_corpus([str(tmp_path)], ByteCodec())
    assert corpus.names == ("a.py", "c.jsonl:1", "c.jsonl:3", "b/two.py")
    assert [corpus[i].tolist() for i in range(4)] == [
        [49, 255, 256], [120, 256], [*"é".encode(), 256], [50, 50, 256],
    ]  # fmt: skip


def test_what_is_no_document_is_passed_over(tmp_path):
    for name in (".hidden", "empty", "binary", "left.out", "kept.py", "not_included"):
        (tmp_path / name).write_bytes({"empty": b"", "binary": b"ab\0c"}.get(name, b"x"))
    (tmp_path / "nowhere.py").symlink_to(tmp_path / "gone")
    for folder in (".git", "build"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file.py").write_text("x")
    corpus = read_corpus(
        [str(tmp_path)], ByteCodec(), include=["*.py", "*.out", "e*", "b*"], exclude=["build", "left*"]
    )
    assert corpus.names == ("kept.py",)


def test_stdlib_has_modules_and_neither_tests_nor_packages():
    names = read_corpus(["stdlib"], ByteCodec()).names
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    some = read_corpus(["stdlib"], ByteCodec(), include=["d*"], exclude=["d[!e]*"]).names
    assert "json/decoder.py" in some
    assert all(name.split("/")[-1].startswith("de") and name.endswith(".py") for name in some)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "data.paths '.*corpus': there is no such file or folder"),
        (lambda path: path.mkdir(), "no documents in 0 files that match data.include \\*.py\\.$"),
        (lambda path: path.write_bytes(b""), "data.paths '.*corpus' is empty. Leave it out"),
        (lambda path: path.write_bytes(b"a\0"), "data.paths '.*corpus' is binary: it has a zero byte"),
        (
            lambda path: [path.mkdir(), *((path / f"{i}.py").write_bytes(b"\0" * (i > 0)) for i in range(5))],
            "5 files .* \\*.py: '.*0.py' is empty; '.*1.py' is binary.*; '.*2.py' .*; and 2 more\\.$",
        ),
    ],
)
def test_missing_and_empty_data_are_told(tmp_path, make, message):
    make(tmp_path / "corpus")
    with pytest.raises(ValueError, match=message):
        read_corpus([str(tmp_path / "corpus")], ByteCodec(), include=["*.py"])


def test_a_document_in_which_nothing_can_be_predicted_is_passed_over(tmp_path, tokenizer_file):
    file, codec = tmp_path / "data.jsonl", open_codec(tokenizer_file)
    file.write_text('{"text": ""}\n{"text": "ring"}\n')
    with pytest.raises(ValueError, match="data.jsonl' has no document of two tokens or more"):
        read_corpus([str(file)], codec)
    with file.open("a") as lines:
        lines.write('{"text": "ring ring"}\n')
    assert read_corpus([str(file)], codec).names == ("data.jsonl:3",)


def test_a_file_that_is_found_more_than_once_is_read_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    paths = [str(tmp_path / "b"), str(tmp_path), str(tmp_path / "sub" / ".." / "a")]
    (tmp_path / "sub").mkdir()
    assert read_corpus(paths, ByteCodec()).names == ("b", "a")


@pytest.mark.parametrize("line", ["{", "3", '{"txt": "a"}', '{"text": 3}'])
def test_a_line_that_is_no_document_is_told_by_its_number(tmp_path, line):
    file = tmp_path / "data.jsonl"
    file.write_text('{"text": "a"}\n' + line)
    with pytest.raises(ValueError, match="data.jsonl:2: not an object with a string 'text'"):
        read_corpus([str(file)], ByteCodec())


@pytest.fixture
def tokenizer_file(tmp_path):
    import tokenizers

    words = ["[UNK]", "<end>", "ring", "attention", "<", "end", ">"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<end>"])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    return str(path)


def test_any_tokenizer_ends_documents_with_the_token_asked_for(tokenizer_file):
    assert list(open_codec(tokenizer_file).encode(b"ring attention")) == [2, 3]
    codec = open_codec(tokenizer_file, "<end>")
    assert isinstance(codec, TextCodec)
    assert list(codec.encode(b"ring attention ring")) == [2, 3, 2, 1]
    assert 1 not in list(codec.encode(b"ring <end> ring"))[:-1]  # spelled in a document, it is text
    assert codec.vocab_size == 7


def test_a_tokenizer_is_found_in_the_home_folder(tokenizer_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert list(open_codec("~/tokenizer.json").encode(b"ring attention")) == [2, 3]


def test_high_ids_of_a_vocabulary_with_holes_are_kept(tmp_path):
    import tokenizers

    words = tokenizers.models.WordLevel({"a": 0, "b": 90_000}, unk_token="a")
    tokenizers.Tokenizer(words).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "document").write_text("b")
    codec = open_codec(str(tmp_path / "tokenizer.json"), "b")
    assert read_corpus([str(tmp_path / "document")], codec)[0].tolist() == [90_000] * 2


def test_an_end_that_is_no_token_is_refused(tokenizer_file):
    with pytest.raises(ValueError, match="data.end_token 'ring ring' is 2 tokens of this tokenizer"):
        open_codec(tokenizer_file, "ring ring")
    with pytest.raises(ValueError, match="with data.tokenizer 'bytes', token 256 ends a document"):
        open_codec("bytes", "<end>")
    with pytest.raises(ValueError, match="'nothing.json': there is no such file"):
        open_codec("nothing.json")


@given(st.binary(max_size=50))
def test_bytes_come_back_as_they_were(document):
    codec = ByteCodec()
    assert codec.decode(codec.encode(document)[:-1]) == document.decode(errors="replace")


def test_split_is_by_content_and_stays_when_documents_are_added(rng):
    corpus = random_corpus(rng, [20] * 300)
    train, held = split(corpus, 0.2)
    assert sorted([*train, *held]) == list(range(300))
    assert 30 < len(held) < 90
    # Each document a second time, and other ones before them.
    documents = [corpus[i] for i in range(300)]
    others = rng.integers(1, 250, (50, 20))
    larger = make_corpus(*others, *documents, *documents)
    _, held_of_larger = split(larger, 0.2)
    assert {i - 50 for i in held_of_larger if i >= 50} == {*held, *(held + 300)}


def test_something_is_held_out_of_few_documents_and_nothing_if_so_asked(rng):
    corpus = random_corpus(rng, [20, 20, 20])
    assert len(split(corpus, 1e-9)[1]) == 1
    assert len(split(corpus, 0.0)[1]) == 0
    with pytest.raises(ValueError, match="data.held_out 0.1: 1 document\\(s\\) leave none to train on"):
        split(random_corpus(rng, [20]), 0.1)


# Packing


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 16))
def test_every_token_but_a_last_one_alone_is_in_one_piece_and_every_piece_in_one_row(sizes, length):
    found = pieces(range(len(sizes)), sizes, length)
    rows = pack(found, length)
    assert sorted(piece for row in rows for piece in row) == sorted(found)
    assert all(sum(piece.size for piece in row) <= length for row in rows)
    places = [(p.document, p.start + i) for p in found for i in range(p.size)]
    assert sorted(places) == [
        (d, i) for d, size in enumerate(sizes) for i in range(size) if i % length or i < size - 1
    ]
    # Best fit: no two rows could be one.
    room = sorted(sum(piece.size for piece in row) for row in rows)
    assert len(room) < 2 or room[0] + room[1] > length


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(2, 16))
def test_inputs_and_targets_of_all_rows_are_the_documents(sizes, length):
    # Every token of the corpus is another number, so that nothing can be mistaken.
    corpus = make_corpus(*np.split(np.arange(1, sum(sizes) + 1), np.cumsum(sizes)[:-1]))
    rows = PackedRows(corpus, range(len(corpus)), length)
    found = [span for i in range(len(rows)) for span in spans(rows[i])]
    inputs = set(corpus.tokens.tolist()) - {
        end for end, size in zip(corpus.offsets[1:].tolist(), sizes, strict=True) if size % length == 1
    }
    assert sorted(token for tokens, _, _ in found for token in tokens) == sorted(inputs)
    first = set((corpus.offsets[:-1] + 1).tolist())
    assert sorted(t for _, targets, _ in found for t in targets) == sorted(
        set(corpus.tokens.tolist()) - first
    )
    for tokens, targets, positions in found:
        assert positions == list(range(len(tokens)))
        assert targets == [token + 1 for token in tokens][: len(targets)]
        assert targets
    assert rows.num_tokens == len(inputs)


def test_padding_has_no_weight_no_segment_and_position_minus_one(rng):
    row = PackedRows(random_corpus(rng, [3, 5]), [0, 1], 11)[0]
    assert row.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, -1, -1, -1]
    assert row.segment_ids.tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    assert row.weights.tolist() == [1, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    assert not row.tokens[8:].any()


# Batches


def make_mesh(data: int, ring: int):
    return jax.make_mesh(
        (data, ring), ("data", "ring"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: data * ring]
    )


def natural(batch: Batch, ring: Ring, ring_size: int) -> Batch:
    order = layouts.order(ring.layout, batch.tokens.shape[1], ring_size)
    return jax.tree.map(lambda x: np.asarray(x)[:, np.argsort(order)], batch)


def assert_same(a: Batch, b: Batch) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
    ("data", "ring_size", "layout"), [(1, 8, "zigzag"), (2, 3, "striped"), (4, 1, "zigzag")]
)
def test_batches_do_not_depend_on_mesh_and_layout(rng, data, ring_size, layout):
    rows = PackedRows(random_corpus(rng, rng.integers(2, 90, 40)), range(40), 48)
    plain = Batches(rows, batch_size=4, seed=1, mesh=make_mesh(1, 1), ring=Ring(batch_axes=("data",)))
    ring = Ring(layout=layout, batch_axes=("data",))
    mesh = make_mesh(data, ring_size)
    batches = Batches(rows, batch_size=4, seed=1, mesh=mesh, ring=ring)
    for _ in range(3):
        batch = next(batches)
        assert batch.tokens.sharding.spec == Batch.spec(ring)
        assert_same(natural(batch, ring, ring_size), natural(next(plain), Ring(), 1))


def test_an_epoch_has_every_row_once_and_the_next_one_another_order(rng):
    rows = PackedRows(random_corpus(rng, [8] * 15), range(15), 8)
    batches = Batches(rows, batch_size=3, seed=0, mesh=make_mesh(1, 1))
    epochs = [[np.asarray(next(batches).tokens) for _ in range(5)] for _ in range(2)]
    wanted = sorted(rows[i].tokens.tolist() for i in range(15))
    flat = [[row.tolist() for batch in epoch for row in batch] for epoch in epochs]
    assert [sorted(epoch) for epoch in flat] == [wanted, wanted]
    assert flat[0] != flat[1]
    other = Batches(rows, batch_size=3, seed=1, mesh=make_mesh(1, 1))
    assert [row.tolist() for row in np.asarray(next(other).tokens)] != flat[0][:3]


def test_a_state_goes_on_with_the_very_next_batch(rng):
    rows = PackedRows(random_corpus(rng, [8] * 15), range(15), 8)
    make = lambda: Batches(rows, batch_size=4, seed=0, mesh=make_mesh(1, 1))
    first = make()
    for _ in range(6):  # past the end of an epoch, in the midst of a batch
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    again = make()
    again.set_state(state)
    for _ in range(3):
        assert_same(next(first), next(again))


def test_held_out_rows_come_once_each_and_always_the_same(rng):
    rows = PackedRows(random_corpus(rng, [8] * 7), range(7), 8)
    take = lambda **options: [
        np.asarray(batch.tokens)
        for batch in held_out_batches(rows, batch_size=3, mesh=make_mesh(1, 1), **options)
    ]
    found = np.concatenate(take())
    assert sorted(found[:7].tolist()) == sorted(rows[i].tokens.tolist() for i in range(7))
    assert not found[7:].any()
    np.testing.assert_array_equal(np.concatenate(take(limit=2)), found[:6])


def test_a_process_makes_its_own_rows_and_columns_only(rng, monkeypatch):
    rows = PackedRows(random_corpus(rng, [16] * 4), range(4), 16)
    mesh, ring = make_mesh(2, 4), Ring(layout="zigzag", batch_axes=("data",))
    whole = Placement(mesh, ring, 4, 16)
    full = whole.host_batch([rows[i] for i in range(4)])
    theirs = whole.sharding.devices_indices_map((4, 16))
    # As if this process had the last two devices of the second row of the mesh.
    mine = {device: theirs[device] for device in mesh.devices[1, 2:]}
    monkeypatch.setattr(
        type(whole.sharding), "addressable_devices_indices_map", lambda self, shape: mine, raising=False
    )
    part = Placement(mesh, ring, 4, 16)
    assert part.rows.tolist() == [2, 3]
    assert part.columns.tolist() == list(range(8, 16))
    made = part.host_batch([rows[2], rows[3]])
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y[2:, 8:]), made, full)


def test_what_does_not_fit_the_mesh_is_told(rng):
    rows = PackedRows(random_corpus(rng, [8]), [0], 24)
    with pytest.raises(
        ValueError, match="data.sequence_length 24 does not fit .* multiple of 16, such as 32"
    ):
        Batches(rows, batch_size=1, seed=0, mesh=make_mesh(1, 8), ring=Ring(layout="zigzag"))
    with pytest.raises(ValueError, match="data.batch_size 3 does not divide over the 2 devices"):
        Batches(rows, batch_size=3, seed=0, mesh=make_mesh(2, 1), ring=Ring(batch_axes=("data",)))


def test_rows_are_a_source_for_grain(rng):
    rows = PackedRows(random_corpus(rng, [8] * 4), range(4), 8)
    batch = grain.MapDataset.source(rows).batch(4)[0]
    assert batch.tokens.shape == (4, 8)
