from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from fake_hub import FakeHub, serve_fake_hub
from tokenizers import Tokenizer

from builder import hub
from builder.calibration import Rows, choose_rows
from builder.errors import BuildError, CalibrationError
from builder.manifest import Manifest, load_manifest

WriteRelease = Callable[..., Path]
Release = Callable[..., Manifest]
DATASET = "acme/news"
WORDS = (
    "the",
    "module",
    "defines",
    "a",
    "function",
    "that",
    "returns",
    "an",
    "object",
    "with",
    "its",
    "name",
    "and",
    "value",
)
BEGIN = 1


@pytest.fixture
def release(write_release: WriteRelease) -> Release:
    """A manifest whose calibration section has these keys besides or instead of the usual ones."""

    def make(lines: list[Any] | bytes | None = None, **changes: Any) -> Manifest:
        manifest = load_manifest(write_release(**{f"calibration.{key}": value for key, value in changes.items()}))
        if lines is not None:
            content = lines if isinstance(lines, bytes) else "".join(f"{json.dumps(line)}\n" for line in lines).encode()
            (manifest.path.parent / "calibration.jsonl").write_bytes(content)
        return manifest

    return make


def choose(manifest: Manifest) -> Rows:
    return choose_rows(manifest, manifest.resolve("base"))


def refusal(manifest: Manifest, kind: type[BuildError] = CalibrationError) -> str:
    with pytest.raises(kind) as caught:
        choose(manifest)
    return str(caught.value)


def encode(manifest: Manifest, text: str, *, is_special: bool = True) -> tuple[int, ...]:
    """Token ids by the tokenizers library alone, read from the base's own file."""
    tokenizer = Tokenizer.from_file(str(manifest.resolve("base") / "tokenizer.json"))
    return tuple(tokenizer.encode(text, add_special_tokens=is_special).ids)


def write_texts(count: int, *, words: int = 40) -> list[dict[str, str]]:
    """Rows that differ in every word's order; forty words make forty tokens or more."""
    return [
        {"text": f"{index} " + " ".join(WORDS[(index + word) % len(WORDS)] for word in range(words))}
        for index in range(count)
    ]


# --- which rows -------------------------------------------------------------------------------------------------------


def test_the_repositorys_rows_are_these(release: Release) -> None:
    rows = choose(release())
    assert len(rows.tokens) == 8 and rows.num_tokens == sum(len(row) for row in rows.tokens)
    assert rows.digest == "72a6d02b7addfe4dd6493df6780c2ebf879509e4bf1b71931df5d68ecf7634a6"


def test_rows_are_a_function_of_the_seed(release: Release) -> None:
    texts = write_texts(50)
    first, again, other = (choose(release(texts, seed=seed)) for seed in (3, 3, 4))
    assert first == again and first.digest == again.digest
    assert first.tokens != other.tokens and first.digest != other.digest
    assert len(set(first.tokens)) == 8, "no row is taken twice"


def test_rows_are_encoded_as_the_tokenizers_library_does_and_cut(release: Release) -> None:
    texts = write_texts(8)
    manifest = release(texts, tokens=[4, 20])
    expected = {encode(manifest, row["text"])[:20] for row in texts}
    rows = choose(manifest)
    assert set(rows.tokens) == expected and len(expected) == 8
    assert {len(row) for row in rows.tokens} == {20}


def test_short_rows_are_skipped_and_others_taken_in_their_place(release: Release) -> None:
    long = write_texts(8)
    manifest = release([{"text": "too short"}] * 40 + long)
    assert set(choose(manifest).tokens) == {encode(manifest, row["text"])[:64] for row in long}


def test_a_row_of_exactly_the_shortest_length_is_taken(release: Release) -> None:
    text = write_texts(1)[0]["text"]
    length = len(encode(release(), text))
    assert len(choose(release([{"text": text}], samples=1, tokens=[length, length])).tokens[0]) == length
    assert refusal(release([{"text": text}], samples=1, tokens=[length + 1, length + 1])).startswith("only 0 of 1 rows")


def test_special_tokens_are_added_or_not(release: Release) -> None:
    text = write_texts(1)[0]["text"]
    given, bare = (
        choose(release([{"text": text}], samples=1, add_special_tokens=is_added)) for is_added in (True, False)
    )
    assert given.tokens[0][0] == BEGIN and given.tokens[0][1:] == bare.tokens[0]
    assert bare.tokens[0] == encode(release(), text, is_special=False)


def test_chat_messages_go_through_the_base_models_template(release: Release) -> None:
    text = write_texts(1)[0]["text"]
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
    manifest = release([{"messages": messages}], column="messages", chat_template=True, samples=1, tokens=[1, 400])
    template = f"<|begin|><|user|>\n{text}<|end|>\n<|assistant|>\nyes<|end|>\n"
    [row] = choose(manifest).tokens
    assert row == encode(manifest, template, is_special=False) and row.count(BEGIN) == 1


# --- the digest -------------------------------------------------------------------------------------------------------


def test_the_digest_is_that_of_lengths_and_ids() -> None:
    numbers = (2, 5, 70000, 1, 0)
    content = b"".join(number.to_bytes(4, "little") for number in numbers)
    assert Rows(((5, 70000), (0,))).digest == hashlib.sha256(content).hexdigest()


def test_the_digest_tells_order_content_and_where_rows_end_apart() -> None:
    rows = [((1, 2), (3,)), ((3,), (1, 2)), ((1, 2), (4,)), ((1,), (2, 3)), ((1, 2, 3),), ((1, 2), (3,), ())]
    assert len({Rows(tokens).digest for tokens in rows}) == len(rows)


# --- JSON lines -------------------------------------------------------------------------------------------------------


def test_empty_lines_count_as_lines_but_not_as_rows(release: Release) -> None:
    texts = [json.dumps(row) for row in write_texts(8)]
    assert len(choose(release("\n\n".join(["", *texts, " "]).encode())).tokens) == 8
    manifest = release("\n\n".join(["", texts[0], '{"txt": 1}']).encode())
    assert refusal(manifest).splitlines()[0] == "row 5 has no text in column text"


def test_only_a_newline_ends_a_line(release: Release) -> None:
    text = "one\u2028two\x85three\x0bfour " + write_texts(1)[0]["text"]
    manifest = release(json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", "\x0b").encode(), samples=1)
    assert refusal(manifest).startswith("line 1 is not JSON: Invalid control character")
    manifest = release(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\r\n", samples=1)
    assert choose(manifest).tokens == (encode(manifest, text)[:64],)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_a_file_without_rows_is_refused(release: Release, content: bytes) -> None:
    manifest = release(content)
    assert refusal(manifest) == (
        "the calibration data has no rows\n"
        f"  in {manifest.where('calibration', 'path')}\n  fix: give a data set with text in it"
    )


def test_a_missing_file_is_named(release: Release) -> None:
    manifest = release(path="rows.jsonl")
    assert refusal(manifest) == (
        f"no such file: {manifest.path.parent / 'rows.jsonl'}\n"
        f"  in {manifest.where('calibration', 'path')}\n  fix: give a file relative to the manifest"
    )


@pytest.mark.parametrize(
    ("line", "what", "fix"),
    [
        (
            b'{"text": "a"',
            "line 2 is not JSON: Expecting ',' delimiter: line 2 column 1 (char 13)",
            "mend the line",
        ),
        (
            b'{"text": "\xff"}',
            "line 2 is not JSON: 'utf-8' codec can't decode byte 0xff in position 10: invalid start byte",
            "mend the line",
        ),
        (b'["a"]', "line 2 is not a JSON object", 'write {"text": "..."}'),
        (
            b'{"article": "a", "id": 3}',
            "row 2 has no text in column text",
            "set calibration.column to one of article, id, or mend the row",
        ),
        (
            b'{"text": ["a"]}',
            "row 2 has no text in column text",
            "set calibration.column to one of text, or mend the row",
        ),
        (
            b"{}",
            "row 2 has no text in column text",
            "set calibration.column to one of its columns, or mend the row",
        ),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(release: Release, line: bytes, what: str, fix: str) -> None:
    manifest = release(b'{"text": "fine"}\n' + line + b"\n")
    path = manifest.path.parent / "calibration.jsonl"
    assert refusal(manifest) == f"{what}\n  in {path}:2\n  fix: {fix}"


def test_text_where_messages_are_expected_is_refused(release: Release) -> None:
    manifest = release([{"text": "a"}], chat_template=True)
    assert refusal(manifest) == (
        "row 1 has no list of messages in column text\n"
        f"  in {manifest.path.parent / 'calibration.jsonl'}:1\n"
        "  fix: set calibration.column to one of text, or mend the row"
    )


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "user"}], "'dict object' has no attribute 'content'"),
        (["hello"], "'str object' has no attribute 'role'"),
    ],
)
def test_messages_that_do_not_suit_the_template_are_refused(release: Release, messages: list[Any], reason: str) -> None:
    manifest = release([{"text": messages}], chat_template=True, samples=1)
    assert refusal(manifest) == (
        f"row 1 cannot be tokenized: UndefinedError: {reason}\n"
        f"  in {manifest.where('calibration', 'path')}\n  fix: mend the row, or see that it suits the chat template"
    )


def test_a_text_that_is_no_unicode_is_refused(release: Release) -> None:
    manifest = release(b'{"text": "\\ud800"}', samples=1)
    assert refusal(manifest).startswith("row 1 cannot be tokenized: ")


@pytest.mark.parametrize(
    ("texts", "num_chosen", "fix"),
    [
        ([*write_texts(5), {"text": "short"}], 5, "set samples to 5 or less, lower tokens[0], or give more rows"),
        ([{"text": "short"}] * 6, 0, "lower tokens[0], or give longer rows"),
    ],
)
def test_too_few_rows_are_refused(release: Release, texts: list[Any], num_chosen: int, fix: str) -> None:
    manifest = release(texts)
    assert refusal(manifest) == (
        f"only {num_chosen} of 6 rows have 16 tokens or more, but samples is 8\n"
        f"  in {manifest.where('calibration', 'samples')}\n  fix: {fix}"
    )


# --- Parquet and the Hub ----------------------------------------------------------------------------------------------


def make_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue()


def test_a_parquet_file_gives_the_same_rows_as_json_lines(release: Release) -> None:
    texts = write_texts(20)
    expected = choose(release(texts))
    manifest = release(path="rows.parquet")
    (manifest.path.parent / "rows.parquet").write_bytes(make_parquet([{**row, "id": 1} for row in texts]))
    assert choose(manifest) == expected


def test_a_parquet_row_without_text_is_refused_with_its_number(release: Release) -> None:
    manifest = release(path="rows.parquet", column="article")
    path = manifest.path.parent / "rows.parquet"
    path.write_bytes(make_parquet([{"id": 1, "text": "a"}]))
    assert refusal(manifest) == (
        f"row 1 has no text in column article\n  in {path}:1\n"
        "  fix: set calibration.column to one of id, text, or mend the row"
    )
    path.write_bytes(make_parquet([{"article": "a"}] * 4 + [{"article": None}]))
    assert refusal(manifest).splitlines()[0] == "row 5 has no text in column article"


def test_a_damaged_parquet_file_is_refused(release: Release) -> None:
    manifest = release(path="rows.parquet")
    (manifest.path.parent / "rows.parquet").write_bytes(make_parquet(write_texts(9))[:-20])
    said = refusal(manifest).splitlines()
    assert said[0].startswith("rows.parquet is not a whole Parquet file: ArrowInvalid: Parquet magic bytes not found")
    assert said[1:] == [f"  in {manifest.where('calibration', 'path')}", "  fix: fetch it again"]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    monkeypatch.setattr(hub, "MAX_RETRIES", 0)
    with serve_fake_hub(tmp_path, monkeypatch) as running:
        yield running


FILES = {
    "README.md": b"#",
    "dataset_infos.json": b"{}",
    "1.0.0/train-00000-of-00001.parquet": make_parquet([{"article": f"old {row['text']}"} for row in write_texts(9)]),
    "3.0.0/train-00000-of-00002.parquet": make_parquet([{"article": row["text"]} for row in write_texts(9)[:4]]),
    "3.0.0/train-00001-of-00002.parquet": make_parquet([{"article": row["text"]} for row in write_texts(9)[4:]]),
    "3.0.0/test-00000-of-00001-a1b2c3d4e5f60718.parquet": make_parquet(
        [{"article": f"test {row['text']}"} for row in write_texts(9)]
    ),
    "3.0.0/train-clean.jsonl": b"not JSON",
}


def from_hub(release: Release, revision: str | None, **changes: Any) -> Manifest:
    return release(path=None, dataset=DATASET, revision=revision, column="article", **changes)


def test_a_hub_data_set_is_read_by_config_and_split(fake: FakeHub, release: Release) -> None:
    revision = fake.add(DATASET, FILES, kind="dataset")
    expected = choose(release(write_texts(9)))
    assert choose(from_hub(release, revision, config="3.0.0")) == expected
    assert {answer.name for answer in fake.answers} == {name for name in FILES if name.startswith("3.0.0/train-0")}

    manifest = from_hub(release, revision, config="3.0.0", split="test")
    assert set(choose(manifest).tokens) < {encode(manifest, f"test {row['text']}")[:64] for row in write_texts(9)}
    manifest = from_hub(release, revision, config="1.0.0")
    assert set(choose(manifest).tokens) < {encode(manifest, f"old {row['text']}")[:64] for row in write_texts(9)}


def test_json_lines_on_the_hub_need_no_config(fake: FakeHub, release: Release) -> None:
    lines = "".join(json.dumps({"article": row["text"]}) + "\n" for row in write_texts(9))
    revision = fake.add(DATASET, {"train.jsonl": lines.encode(), "test.jsonl": b"{}"}, kind="dataset")
    assert choose(from_hub(release, revision)) == choose(release(write_texts(9)))


@pytest.mark.parametrize(
    ("changes", "files"), [({"config": "2.0.0"}, "config 2.0.0, split train"), ({"split": "dev"}, "split dev")]
)
def test_a_split_that_is_not_there_is_refused(
    fake: FakeHub, release: Release, changes: dict[str, str], files: str
) -> None:
    manifest = from_hub(release, fake.add(DATASET, FILES, kind="dataset"), **changes)
    assert refusal(manifest) == (
        f"{DATASET} has no Parquet or JSON lines file for {files}\n"
        f"  in {manifest.where('calibration', 'dataset')}\n"
        "  fix: check `config` and `split` against the data set's files"
    )


def test_several_configs_are_never_mixed(fake: FakeHub, release: Release) -> None:
    manifest = from_hub(release, fake.add(DATASET, FILES, kind="dataset"))
    assert refusal(manifest) == (
        f"{DATASET} has split train in several folders: 1.0.0, 3.0.0\n"
        f"  in {manifest.where('calibration', 'dataset')}\n  fix: set calibration.config to the one that is meant"
    )


def test_a_data_set_without_revision_is_not_read(release: Release) -> None:
    manifest = from_hub(release, None)
    assert refusal(manifest, BuildError) == (
        f"calibration.revision is missing, and {DATASET} may change under its name\n"
        f"  in {manifest.where('calibration', 'dataset')}\n"
        f"  fix: run `doit pin:{manifest.name}`, or add `revision:` with a 40-hex commit of the data set"
    )


# --- the tokenizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("cut", "JSONDecodeError: "),
        ("no JSON", "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
        ("missing", "ValueError: Couldn't instantiate the backend tokenizer from one of: (1) "),
        ("own code", "ValueError: The repository "),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_three_lines(release: Release, damage: str, reason: str) -> None:
    manifest = release()
    folder = manifest.resolve("base")
    path = folder / "tokenizer.json"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    elif damage == "no JSON":
        path.write_text("nothing")
    elif damage == "missing":
        path.unlink()
    else:
        config = json.loads((folder / "tokenizer_config.json").read_text())
        config |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    said = refusal(manifest).splitlines()
    assert said[0].startswith(f"the base model's tokenizer cannot be read: {reason}")
    assert said[1:] == [f"  in {folder}", "  fix: see that the base has its tokenizer files"]
    assert not (folder / "ran").exists()
