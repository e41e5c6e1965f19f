import gzip
import io
import itertools
import json
import lzma
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pldr.data import rows as rows_module
from pldr.data import sources as sources_module
from pldr.data.rows import TokenRows, TokenStream, cached_rows, collate, read_passages, rows_of, shuffled, write_rows
from pldr.data.sources import BadRows, Share, Source, documents_of, parse_interval, read_pieces
from pldr.recipe import DataRecipe

pyarrow = pytest.importorskip("pyarrow")
TEXTS = ["the cat", "grüße 😀\nnext line", "that dog ran", "see him at her house"]


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd}


def json_lines(texts, column="text"):
    return "".join(json.dumps({"title": "t", column: text}) + "\n" for text in texts).encode()


def pieces(texts):
    return [sources_module.Piece(text, True) for text in texts]


def token_ids(tokenizer, texts):
    return [i for text in texts for i in [*tokenizer(text, add_special_tokens=False)["input_ids"], 3]]


def read_documents(names, text_column="text", *, strict=True):
    """Whole documents."""
    for found in documents_of(read_pieces(Source(names, text_column), BadRows(strict))):
        yield "".join(piece.text for piece in found)


class TestReading:
    def test_pydoc_topics_are_split_without_overlap(self):
        train_texts = set(read_documents(["pydoc-topics:train"]))
        held_out = set(read_documents(["pydoc-topics:validation"]))
        assert train_texts
        assert held_out
        assert not train_texts & held_out

    @pytest.mark.parametrize("ending", COMPRESS)
    def test_json_lines(self, tmp_path, ending):
        file = tmp_path / f"books.jsonl{ending}"
        file.write_bytes(COMPRESS[ending](json_lines(TEXTS, "body")))
        assert list(read_documents([str(file)], "body")) == TEXTS
        with pytest.raises(ValueError, match=r"books.*: line 1 \(with '.*'\): no JSON object with 'text'"):
            list(read_documents([str(file)]))

    @pytest.mark.parametrize("ending", COMPRESS)
    def test_text_files(self, tmp_path, ending, monkeypatch):
        """One document a file, also where it is read in pieces; nothing of it is lost or changed."""
        monkeypatch.setattr(sources_module, "_PIECE_CHARACTERS", 50)
        text = "".join(f"line {i} grüße 😀\r\n\n" for i in range(40)) + "no newline at the end"
        for name in ("a", "b"):
            (tmp_path / f"{name}.txt{ending}").write_bytes(COMPRESS[ending](text.encode()))
        found = list(read_pieces(Source([f"{tmp_path}/*.txt*"]), BadRows()))
        assert len(found) > 10
        assert sum(piece.ends for piece in found) == 2
        assert list(read_documents([f"{tmp_path}/*.txt*"])) == [text, text]

    def test_parquet(self, tmp_path):
        from pyarrow import parquet

        file = tmp_path / "books.parquet"
        parquet.write_table(pyarrow.table({"body": [*TEXTS, None, ""], "n": list(range(6))}), file)
        bad = BadRows()
        assert [piece.text for piece in read_pieces(Source([str(file)], "body"), bad)] == TEXTS
        assert bad.summary().startswith("1 skipped: 'body' is not a text (first: ")
        assert "row 5" in bad.first["'body' is not a text"]
        with pytest.raises(ValueError, match=r"no column 'text'; it has body, n"):
            list(read_documents([str(file)]))
        parquet.write_table(pyarrow.table({"\x1b[31m": [1]}), tmp_path / "red.parquet")
        with pytest.raises(ValueError, match=r"it has \\x1b\[31m$"):
            list(read_documents([str(tmp_path / "red.parquet")]))
        file.write_bytes(file.read_bytes()[:-20])
        with pytest.raises(ValueError, match=r"books.parquet: damaged or unreadable file"):
            list(read_documents([str(file)], "body"))

    def test_parquet_rows_that_are_no_text(self, tmp_path):
        from pyarrow import parquet

        offsets, letters = (
            pyarrow.py_buffer(content)
            for content in (bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0]), b"a\xffb")
        )
        parquet.write_table(
            pyarrow.table({
                "text": pyarrow.StringArray.from_buffers(3, offsets, letters),
                "when": pyarrow.array([2**62, 1, 2], pyarrow.timestamp("us")),
                "tree": [[["a"]]] * 3,
            }),
            tmp_path / "a.parquet",
        )  # fmt: skip
        for column, fault, count in (("text", "not valid UTF-8", 1), ("when", "'when' is not a text", 3),
                                     ("tree", "'tree' is not a text", 3)):  # fmt: skip
            bad = BadRows()
            found = [piece.text for piece in read_pieces(Source([f"{tmp_path}/a.parquet"], column), bad)]
            assert found == (["a", "b"] if column == "text" else [])
            assert bad.counts == {fault: count}

    def test_long_documents_are_cut(self, tmp_path, monkeypatch):
        """Rows, too, come in pieces, cut before a space between words where there is one."""
        from pyarrow import parquet

        monkeypatch.setattr(sources_module, "_PIECE_CHARACTERS", 20)
        text = "the cat sat on a mat and " + "x" * 70 + "\n\n   and saw   that " + " " * 50 + "dog"
        (tmp_path / "a.jsonl").write_bytes(json_lines([text]))
        (tmp_path / "b.txt").write_text(text)
        parquet.write_table(pyarrow.table({"text": [text]}), tmp_path / "c.parquet")
        for name in ("a.jsonl", "b.txt", "c.parquet"):
            found = list(read_pieces(Source([f"{tmp_path}/{name}"]), BadRows()))
            assert [piece.text for piece in found] == [
                "the cat sat on a", " mat and", " " + "x" * 19, "x" * 20, "x" * 20,
                "x" * 11 + "\n\n   and", " saw   that", " " * 20, " " * 20, " " * 11 + "dog",
            ]  # fmt: skip
            assert [piece.ends for piece in found] == [False] * 9 + [True]

    def test_of_a_line_that_is_too_long_its_beginning_is_held(self, monkeypatch):
        monkeypatch.setattr(sources_module, "LONGEST_ROW", 100)
        monkeypatch.setattr(sources_module, "_PIECE_CHARACTERS", 30)
        for end in (b"", b"\n", b"\nab", b"\nab\n"):
            lines = list(sources_module._lines(io.BytesIO(b"c" * 100 + b"\n" + b"f" * 1000 + end)))
            assert lines == [b"c" * 100 + b"\n", b"f" * 101, *([end[1:]] if end[1:] else [])]

    @pytest.mark.parametrize("ending", COMPRESS)
    def test_a_row_that_is_too_long(self, tmp_path, monkeypatch, ending):
        from pyarrow import parquet

        monkeypatch.setattr(sources_module, "LONGEST_ROW", 100)
        monkeypatch.setattr(sources_module, "_PIECE_CHARACTERS", 30)
        texts = ["a", "b" * 87, "c" * 88, "d" * 1000, "e"]  # a line has 13 bytes more
        lines = b"".join(b'{"text": "%b"}\n' % text.encode() for text in texts)
        for content in (lines, lines[:-1], lines + b"f" * 1000):
            (tmp_path / f"a.jsonl{ending}").write_bytes(COMPRESS[ending](content))
            bad = BadRows()
            found = read_pieces(Source([f"{tmp_path}/a.jsonl{ending}"]), bad)
            assert "".join(piece.text for piece in found) == "a" + "b" * 87 + "e"
            assert bad.counts == {"longer than 32 MiB": 2 + content.endswith(b"f")}
            assert bad.first["longer than 32 MiB"].endswith("line 3")
        parquet.write_table(pyarrow.table({"text": ["a" * 100, "b" * 101, "c"]}), tmp_path / "a.parquet")
        bad = BadRows()
        assert "".join(p.text for p in read_pieces(Source([f"{tmp_path}/a.parquet"]), bad)) == "a" * 100 + "c"
        assert bad.first == {"longer than 32 MiB": f"{tmp_path}/a.parquet: row 2"}

    def test_what_is_no_file(self, tmp_path, monkeypatch):
        import socket

        (tmp_path / "a.txt").write_text("the cat")
        monkeypatch.chdir(tmp_path)  # a socket's name is a short one
        os.mkfifo("pipe.txt")
        (tmp_path / "broken.txt").symlink_to("nowhere")
        with socket.socket(socket.AF_UNIX) as opened:
            opened.bind("socket.txt")
        for name in ("pipe.txt", "socket.txt", "broken.txt", "/dev/zero", "*.txt"):
            with pytest.raises(ValueError, match=r"data: .*: is a pipe, socket, device or broken link"):
                list(read_documents([name]))
        with pytest.raises(FileNotFoundError, match="matches no file"):
            list(read_documents(["."]))

    @pytest.mark.parametrize("streaming", [False, True])
    def test_hub_data_set_by_its_folder(self, tmp_path, streaming):
        """What `datasets` makes of a data set's repository: here one on disk, with two splits in Parquet."""
        pytest.importorskip("datasets")
        from pyarrow import parquet

        for split, texts in (("train", [*TEXTS, ""]), ("validation", TEXTS[:1])):
            (tmp_path / "set" / "data").mkdir(parents=True, exist_ok=True)
            parquet.write_table(pyarrow.table({"content": texts}), tmp_path / "set/data" / f"{split}-0.parquet")

        def read(split="train", interval="", share=None, column="content"):
            source = Source([f"hub:{tmp_path}/set"], column, split, interval)
            found = read_pieces(source, bad, streaming=streaming, share=share or Share())
            return [piece.text for piece in found]

        bad = BadRows()
        assert read() == TEXTS
        assert bad.counts == {"empty": 1}
        assert read("validation") == TEXTS[:1]
        assert read(interval="1:3") == TEXTS[1:3]
        assert read(interval="2:") == TEXTS[2:]
        if not streaming:
            assert read(interval="20%:60%") == TEXTS[1:3]
        shares = [read(share=Share(rank, 2)) for rank in range(2)]
        assert sorted(itertools.chain(*shares)) == sorted(TEXTS)
        assert all(shares)
        with pytest.raises(ValueError, match=r"split 'test'"):
            read("test")
        with pytest.raises(ValueError, match=r"no column 'text' \(data.text_column\); it has content"):
            read(column="text")

    def test_hub_data_and_files_are_shared_without_loss(self, tmp_path):
        pytest.importorskip("datasets")
        from pyarrow import parquet

        (tmp_path / "set").mkdir()
        parquet.write_table(
            pyarrow.table({"text": [f"hub {i}" for i in range(5)]}), tmp_path / "set" / "train-0.parquet"
        )
        (tmp_path / "a.jsonl").write_bytes(json_lines(f"line {i}" for i in range(6)))
        names = [f"hub:{tmp_path}/set", f"{tmp_path}/a.jsonl"]
        shares = [[p.text for p in read_pieces(Source(names), BadRows(), share=Share(rank, 2))] for rank in range(2)]
        assert sorted(itertools.chain(*shares)) == [f"hub {i}" for i in range(5)] + [f"line {i}" for i in range(6)]
        with pytest.raises(ValueError, match="can not be shared among processes"):
            list(read_pieces(Source(names, interval="0:4"), BadRows(), share=Share(0, 2)))

    def test_a_data_set_that_is_not_there(self):
        pytest.importorskip("datasets")
        with pytest.raises(ValueError, match=r"hub:/nowhere/set"):
            list(read_documents(["hub:/nowhere/set"]))

    @pytest.mark.parametrize("ending", COMPRESS)
    def test_bad_rows_are_counted_or_refused(self, tmp_path, ending):
        rows = [b'{"text": "good"}', b'{"text": 5}', b"not json", b'{"other": "x"}', b'{"text": "  "}',
                b'{"text": "caf\xe9"}', b'{"text": "lone \\ud800"}', b"[" * 100_000, b'{"n": %b}' % (b"9" * 5000),
                b'{"text": "also good", "n": 1e999999}']  # fmt: skip
        file = tmp_path / f"rows.jsonl{ending}"
        file.write_bytes(COMPRESS[ending](b"\n".join(rows) + b"\n"))
        (tmp_path / "latin.txt").write_bytes(b"good\n" * 10 + b"bad \xff")
        (tmp_path / "cut.txt").write_bytes("grü".encode()[:-1])
        (tmp_path / "blank.txt").write_bytes(b" \n\n")
        bad = BadRows()
        names = [str(file), f"{tmp_path}/*.txt"]
        assert [piece.text for piece in read_pieces(Source(names), bad)] == ["good", "also good"]
        assert bad.counts == {"'text' is not a text": 1, "not JSON": 1, "no JSON object with 'text'": 1, "empty": 2,
                              "not valid UTF-8": 4, "JSON with too long a number, or too deep": 2}  # fmt: skip
        assert "4 skipped: not valid UTF-8 (first: " in bad.summary()
        with pytest.raises(ValueError, match=r"line 2: 'text' is not a text"):
            list(read_documents([str(file)]))
        assert bad.first["JSON with too long a number, or too deep"] == f"{file}: line 8"
        with pytest.raises(ValueError, match=r"cut.txt: not valid UTF-8"):
            list(read_documents([f"{tmp_path}/cut.txt"]))

    @pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
    def test_damaged_files(self, tmp_path, ending):
        content = json_lines(np.random.default_rng(0).bytes(3000).hex() for _ in range(50))
        packed = COMPRESS[ending](content)
        file = tmp_path / f"rows.jsonl{ending}"
        file.write_bytes(packed[: len(packed) // 2])
        with pytest.raises(ValueError, match="damaged or unreadable file"):
            list(read_documents([str(file)], strict=False))
        file.write_bytes(packed[:100] + bytes(64) + packed[164:])
        with pytest.raises(ValueError, match=r"damaged or unreadable file|not JSON|not valid UTF-8"):
            list(read_documents([str(file)]))
        file.write_bytes(b"")  # as a full disk leaves it
        with pytest.raises(ValueError, match=rf"rows.jsonl{ending}: damaged or unreadable file \(it is empty\)"):
            list(read_documents([str(file)], strict=False))

    def test_errors(self, tmp_path, toy_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"nothing\*.txt matches no file"):
            list(read_documents([str(tmp_path / "nothing*.txt")]))
        with pytest.raises(ValueError, match="the parts are train and validation"):
            list(read_documents(["pydoc-topics:test"]))
        with pytest.raises(ValueError, match="tokens are less than one row of 64"):
            write_rows(pieces(["the cat"]), toy_tokenizer, 64, tmp_path)
        (tmp_path / "a.txt").write_text("the cat")
        (tmp_path / "b.txt").write_text(" ")
        recipe = DataRecipe(["unused"], sequence_length=64, cache=str(tmp_path))
        with pytest.raises(ValueError, match=r"less than one row of 65 \(1 skipped: empty \(first: .*b.txt\)\)"):
            cached_rows(Source([f"{tmp_path}/?.txt"]), toy_tokenizer, recipe)
        with pytest.raises(ValueError, match="less than one sequence of 64 tokens"):
            read_passages(Source([f"{tmp_path}/a.txt"]), toy_tokenizer, 64, 1)


class TestIntervals:
    def test_forms(self):
        assert parse_interval("", None) == (0, float("inf"))
        assert parse_interval("3:7", None) == (3, 7)
        assert parse_interval(":7", None) == (0, 7)
        assert parse_interval("3:", None) == (3, float("inf"))
        assert parse_interval("25%:50%", 200) == (50, 100)
        assert parse_interval("12.5%:", 80) == (10, float("inf"))
        for wrong in ("a:b", "5", "1:2:3", "-1:5", "101%:"):
            with pytest.raises(ValueError, match="interval"):
                parse_interval(wrong, 10)
        for empty in ("7:7", "7:3"):
            with pytest.raises(ValueError, match="holds no document"):
                parse_interval(empty, None)
        with pytest.raises(ValueError, match="holds no document of 3"):
            parse_interval("40%:45%", 3)

    def test_parts_of_local_files_do_not_overlap(self, tmp_path):
        """Bad rows keep their index, so that training and validation intervals stay apart."""
        texts = [f"text {i}" if i % 4 else "" for i in range(40)]
        (tmp_path / "a.jsonl").write_bytes(json_lines(texts[:25]))
        (tmp_path / "b.jsonl").write_bytes(json_lines(texts[25:]))

        def read(interval):
            return [p.text for p in read_pieces(Source([f"{tmp_path}/*.jsonl"], interval=interval), BadRows())]

        assert read("0%:75%") + read("75%:100%") == [text for text in texts if text]
        assert read("4:10") == [text for text in texts[4:10] if text]


class TestRows:
    def test_packing_loses_only_the_last_partial_block(self, toy_tokenizer, tmp_path):
        ids = token_ids(toy_tokenizer, TEXTS)
        rows = write_rows(pieces(TEXTS), toy_tokenizer, 7, tmp_path)
        assert torch.cat([row["input_ids"] for row in rows]).tolist() == ids[: len(ids) // 7 * 7]
        facts = rows.facts
        assert (facts["tokens"], facts["left_out_tokens"]) == (len(ids), len(ids) % 7)
        assert (facts["documents"], len(rows)) == (4, len(ids) // 7)
        assert rows[1]["input_ids"].dtype == torch.int64
        assert rows[1]["row"] == 1
        assert torch.equal(rows.full_rows(2), torch.stack([rows[0]["input_ids"], rows[1]["input_ids"]]))
        with pytest.raises(IndexError):
            rows[len(rows)]

    def test_pieces_of_a_document_are_tokenised_as_one(self, toy_tokenizer):
        text = "the cat sat\non a mat\n\nand saw that dog\n"
        whole = pieces([text])
        cut = [sources_module.Piece(line, index == 3) for index, line in enumerate(text.splitlines(keepends=True))]
        one, other = (np.concatenate([ids for ids, _ in rows_module.tokenize(p, toy_tokenizer)]) for p in (whole, cut))
        assert one.tolist() == other.tolist()

    @pytest.mark.parametrize("size", [50, 64, 333])
    def test_where_pieces_end_changes_no_id(self, toy_tokenizer, monkeypatch, size):
        """Whatever of spaces, line ends and composed characters is at the cut, as long as words are shorter than a piece."""
        monkeypatch.setattr(sources_module, "_PIECE_CHARACTERS", size)
        picked = np.random.default_rng(0).choice(list("ab e\u0301\u00a0\u3000\u200b\t\r\n\n    ﬁ½가😀中.▁"), 20_000)
        text = " ".join("".join(picked[i : i + 40]) for i in range(0, 20_000, 40))
        cut = list(sources_module._cut([text]))
        assert "".join(piece.text for piece in cut) == text
        assert 20_000 / size < len(cut) < 3 * 20_000 / size
        one, other = (
            np.concatenate([ids for ids, _ in rows_module.tokenize(p, toy_tokenizer)]) for p in (pieces([text]), cut)
        )
        assert one.tolist() == other.tolist()

    def test_ids_are_below_the_vocabulary(self, toy_tokenizer, monkeypatch):
        monkeypatch.setattr(type(toy_tokenizer), "__len__", lambda self: 100)
        with pytest.raises(ValueError, match=r"tokenizer: gives the id \d+, but has 100 tokens"):
            list(rows_module.tokenize(pieces(["see that dog"]), toy_tokenizer))

    @pytest.mark.parametrize("layout", ["padded", "unpadded"])
    def test_short_rows(self, toy_tokenizer, tmp_path, monkeypatch, layout):
        """Documents are laid out together in groups, here of two; the last row of each group is short."""
        monkeypatch.setattr(rows_module, "GROUP_DOCUMENTS", 2)
        rows = write_rows(pieces(TEXTS), toy_tokenizer, 7, tmp_path, layout)
        expected = []
        for pair in (TEXTS[:2], TEXTS[2:]):
            ids = token_ids(toy_tokenizer, pair)
            expected += [ids[i : i + 7] for i in range(0, len(ids), 7)]
        assert [row["input_ids"].tolist() for row in rows] == expected
        assert rows.facts["left_out_tokens"] == 0
        assert all(len(row) == 7 for row in rows.full_rows(100))
        batch = collate([*rows, {"input_ids": torch.tensor([5]), "row": 9}], pad_token_id=0,
                        length=9 if layout == "padded" else None)  # fmt: skip
        width = 9 if layout == "padded" else 6
        assert batch["input_ids"].shape[1] == width
        read = [*((row[:-1], row[1:]) for row in expected), ([5], [])]  # a row of one token has no target
        for (ids, targets), *found in zip(
            read, batch["input_ids"], batch["shift_labels"], batch["labels"], batch["attention_mask"], strict=True
        ):
            rest = width - len(ids)
            wanted = (ids + [0] * rest, targets + [-100] * (width - len(targets)), ids + [-100] * rest)
            assert [part.tolist() for part in found] == [*wanted, [1] * len(ids) + [0] * rest]

    def test_full_rows_are_inputs_and_their_targets(self):
        rows = torch.arange(10, 24).reshape(2, 7)
        batch = collate([{"input_ids": row, "row": n} for n, row in enumerate(rows)], pad_token_id=0, length=6)
        assert torch.equal(batch["input_ids"], rows[:, :-1])
        assert torch.equal(batch["labels"], rows[:, :-1])
        assert torch.equal(batch["shift_labels"], rows[:, 1:])
        assert batch["row"].tolist() == [0, 1]
        assert "attention_mask" not in batch

    def test_rows_of_an_earlier_version_are_not_read(self, toy_tokenizer, tmp_path):
        """Theirs were as long as what the model reads."""
        write_rows(pieces(TEXTS), toy_tokenizer, 7, tmp_path)
        facts = json.loads((tmp_path / "facts.json").read_text())
        facts["sequence_length"] = facts.pop("row_length")
        (tmp_path / "facts.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match="no row_length, as those of earlier versions; remove this folder"):
            TokenRows(tmp_path)

    def test_cache(self, tmp_path, toy_tokenizer, monkeypatch):
        file = tmp_path / "a.jsonl"
        file.write_bytes(json_lines(TEXTS) + b"bad\n")
        recipe = DataRecipe([str(file)], sequence_length=7, cache=str(tmp_path / "cache"))
        said = []
        first = cached_rows(Source([str(file)]), toy_tokenizer, recipe, report=said.append)
        assert said == [f"data: 1 skipped: not JSON (first: {file}: line 5)"]

        def fail(*args, **kwargs):
            raise AssertionError("tokenised again")

        with monkeypatch.context() as patch:
            patch.setattr(rows_module, "write_rows", fail)
            again = cached_rows(Source([str(file)]), toy_tokenizer, recipe, report=said.append)
            assert len(said) == 2
            assert torch.equal(again.full_rows(9), first.full_rows(9))
            # Everything that the rows depend on makes another entry.
            for change in ({"sequence_length": 5}, {"layout": "padded"}):
                with pytest.raises(AssertionError):
                    cached_rows(Source([str(file)]), toy_tokenizer, DataRecipe(**(vars(recipe) | change)))
            with pytest.raises(AssertionError):
                cached_rows(Source([str(file)], interval="0:2"), toy_tokenizer, recipe)
            file.write_bytes(json_lines(TEXTS[::-1]))
            with pytest.raises(AssertionError):
                cached_rows(Source([str(file)]), toy_tokenizer, recipe)
        assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1  # nothing half-written
        file.write_bytes(json_lines(TEXTS) + b"bad\n")
        with pytest.raises(ValueError, match="line 5: not JSON"):
            cached_rows(Source([str(file)]), toy_tokenizer, DataRecipe(**(vars(recipe) | {"strict": True})))


class TestCache:
    """What is kept is used only as it was written, for the contents that it was made of."""

    @pytest.fixture
    def source(self, tmp_path):
        (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS) + b"bad\n")
        return Source([f"{tmp_path}/a.jsonl"])

    @pytest.fixture
    def recipe(self, tmp_path, source):
        return DataRecipe(source.names, sequence_length=7, cache=str(tmp_path / "cache"), layout="padded")

    @pytest.mark.parametrize("damage", [
        lambda folder: (folder / "tokens.bin").write_bytes(bytes((folder / "tokens.bin").stat().st_size)),
        lambda folder: (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-2]),
        lambda folder: (folder / "tokens.bin").write_bytes(b""),
        lambda folder: (folder / "tokens.bin").unlink(),
        lambda folder: (folder / "facts.json").unlink(),
        lambda folder: (folder / "facts.json").write_text("[]"),
        lambda folder: (folder / "facts.json").write_text('{"rows": 1'),
        lambda folder: (folder / "facts.json").write_text(
            (folder / "facts.json").read_text().replace('"documents": 4', '"documents": 5')
        ),
    ])  # fmt: skip
    def test_damage_is_found(self, toy_tokenizer, source, recipe, tmp_path, damage):
        cached_rows(source, toy_tokenizer, recipe)
        (folder,) = (tmp_path / "cache" / "tokens").iterdir()
        damage(folder)
        with pytest.raises(
            ValueError, match=f"{folder}: cached tokens are not as they were written; remove this folder"
        ):
            cached_rows(source, toy_tokenizer, recipe)

    def test_names_need_not_be_utf8(self, toy_tokenizer, source, recipe, tmp_path):
        file = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jsonl")
        os.rename(tmp_path / "a.jsonl", file)
        rows = cached_rows(Source([file]), toy_tokenizer, recipe)
        assert rows.facts["bad_rows"].endswith(r"\udcff.jsonl: line 5)")

    def test_facts_agree_with_the_ids(self, toy_tokenizer, tmp_path):
        """Also where the sum is not looked at."""
        write_rows(pieces(TEXTS), toy_tokenizer, 7, tmp_path)
        with (tmp_path / "tokens.bin").open("ab") as stream:
            stream.write(bytes(2))
        with pytest.raises(ValueError, match=r"tokens.bin has \d+ ids, facts.json says \d+"):
            TokenRows(tmp_path)

    def test_contents_count(self, toy_tokenizer, source, recipe, tmp_path):
        """Not size and time, which other data can have, too."""
        file = tmp_path / "a.jsonl"
        before = cached_rows(source, toy_tokenizer, recipe).full_rows(9)
        status = file.stat()
        file.write_bytes(json_lines(TEXTS[::-1]) + b"bad\n")
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        assert not torch.equal(cached_rows(source, toy_tokenizer, recipe).full_rows(9), before)

    def test_data_that_changes_while_it_is_read(self, toy_tokenizer, source, recipe, tmp_path, monkeypatch):
        def write(*arguments):
            rows = write_rows(*arguments)
            (tmp_path / "a.jsonl").write_bytes(json_lines(TEXTS[:2]))
            return rows

        monkeypatch.setattr(rows_module, "write_rows", write)
        with pytest.raises(ValueError, match=r"data: .*a.jsonl: changed while it was read"):
            cached_rows(source, toy_tokenizer, recipe)
        assert not list((tmp_path / "cache").rglob("*.bin"))

    def test_cold_starts_at_the_same_time(self, toy_tokenizer, source, recipe, tmp_path, monkeypatch):
        """Four have tokenised before the first one is done: one of them wins, and all read the same."""
        barrier = threading.Barrier(4, timeout=60)

        def write(*arguments):
            rows = write_rows(*arguments)
            barrier.wait()
            return rows

        monkeypatch.setattr(rows_module, "write_rows", write)
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(cached_rows, source, toy_tokenizer, recipe) for _ in range(4)]
            rows = [future.result().full_rows(9) for future in found]
        assert all(torch.equal(other, rows[0]) for other in rows)
        assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


class TestStream:
    @pytest.fixture(autouse=True)
    def small_batches(self, monkeypatch):
        """A stream has no end: its first batch would be hundreds of passes through a small file."""
        monkeypatch.setattr(rows_module, "_BATCH_CHARACTERS", 1000)

    def stream(self, tokenizer, file, **settings):
        recipe = DataRecipe([str(file)], sequence_length=6, **({"shuffle_buffer": 3} | settings))  # rows of 7
        return recipe, lambda **kwargs: TokenStream(Source([str(file)]), tokenizer, recipe, seed=1, **kwargs)

    @pytest.fixture
    def file(self, tmp_path):
        generator = np.random.default_rng(0)
        texts = [" ".join(generator.choice(["the", "cat", "sat", "on", "a", "mat"], 9)) for _ in range(30)]
        (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
        return tmp_path / "a.jsonl"

    def test_every_pass_has_every_token_once(self, toy_tokenizer, file):
        _, make = self.stream(toy_tokenizer, file)
        per_pass = len(token_ids(toy_tokenizer, read_documents([str(file)])))
        ids = torch.cat([row["input_ids"] for row in itertools.islice(make(), 3 * per_pass // 7)]).tolist()
        documents = [tuple(g) for is_end, g in itertools.groupby(ids, lambda i: i == 3) if not is_end]
        wanted = sorted(tuple(token_ids(toy_tokenizer, [text])[:-1]) for text in read_documents([str(file)]))
        first, second = documents[:30], documents[30:60]
        assert sorted(first) == sorted(second) == wanted  # also the document that spans two passes' rows
        assert first != second

    def test_consumers_share_the_documents(self, toy_tokenizer, file, monkeypatch):
        _, make = self.stream(toy_tokenizer, file, shuffle_buffer=0)
        texts = list(read_documents([str(file)]))
        for rank in range(3):
            mine = token_ids(toy_tokenizer, texts[rank::3])
            rows = itertools.islice(make(rank=rank, world_size=3), len(mine) // 7)
            assert torch.cat([row["input_ids"] for row in rows]).tolist() == mine[: len(mine) // 7 * 7]
        monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # which would hang a forked worker
        loader = torch.utils.data.DataLoader(make(), batch_size=None, num_workers=2)
        rows = [row["input_ids"].tolist() for row in itertools.islice(loader, 6)]
        halves = [token_ids(toy_tokenizer, texts[worker::2]) for worker in range(2)]
        assert rows == [halves[i % 2][i // 2 * 7 : i // 2 * 7 + 7] for i in range(6)]

    def test_too_many_consumers(self, toy_tokenizer, file):
        _, make = self.stream(toy_tokenizer, file)
        with pytest.raises(ValueError, match="no document for consumer 31 of 31"):
            next(iter(make(rank=30, world_size=31)))

    def test_shuffled(self):
        import random

        mixed = list(shuffled(iter(range(100)), 10, random.Random(1)))
        assert sorted(mixed) == list(range(100))
        assert mixed != list(range(100))
        assert all(value - place <= 10 for place, value in enumerate(mixed))
        assert list(shuffled(iter(range(5)), 0, random.Random(1))) == list(range(5))
        assert list(shuffled(iter(range(5)), 1, random.Random(1))) == list(range(5))

    def test_the_buffer_is_bounded_by_characters_too(self, monkeypatch):
        import random

        monkeypatch.setattr(rows_module, "_BUFFER_CHARACTERS", 30)
        taken = []

        def items():
            for value in range(100):
                taken.append(value)
                yield value

        for count, _ in enumerate(shuffled(items(), 1000, random.Random(1), lambda item: 10)):
            if len(taken) < 100:
                assert len(taken) - count <= 4
        assert count == 99


def test_rows_of_keeps_everything():
    parts = [(np.arange(i, i + 5, dtype=np.uint16), True) for i in range(0, 50, 5)]
    assert np.concatenate(list(rows_of(iter(parts), 7, "packed"))).tolist() == list(range(50))


def peak_memory(tmp_path, tokenizer, *files):
    """MB that a process has held at most after it has tokenised and read each file, one after the other.

    Pages of mapped files are not counted: they are the system's to drop.
    """
    code = '''
        import sys, threading, time
        from pathlib import Path
        from tokenizers import Tokenizer, models
        from pldr import load_tokenizer
        from pldr.data.sources import Source
        from pldr.data.rows import cached_rows
        from pldr.recipe import DataRecipe

        class BytesTokenizer:
            """A token a byte, at once: what is left of memory and time is the library's own."""

            eos_token_id = 3
            backend_tokenizer = Tokenizer(models.BPE())

            def __len__(self):
                return 256

            def __call__(self, texts, **options):
                return {"input_ids": [list(text.encode()) for text in texts]}

        peak = 0

        def watch():
            global peak
            while True:
                lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
                peak = max(peak, int(lines["RssAnon"].split()[0]))
                time.sleep(0.005)

        threading.Thread(target=watch, daemon=True).start()
        tokenizer = load_tokenizer(sys.argv[1]) if sys.argv[1] else BytesTokenizer()
        for file in sys.argv[3:]:
            rows = cached_rows(Source([file]), tokenizer, DataRecipe([file], sequence_length=128, cache=sys.argv[2]))
            sum(int(row["input_ids"][0]) for row in rows)
            print(peak / 1024)
    '''
    if not os.path.exists("/proc/self/status"):
        pytest.skip("measured where the system tells anonymous memory (Linux)")
    command = [sys.executable, "-c", textwrap.dedent(code), tokenizer, tmp_path / "cache", *files]
    # Each thread's heap would count when it is first used.
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    run = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return [float(peak) for peak in run.stdout.split()]


SENTENCES = "the cat sat on a mat and saw that dog " * 100


def many_rows(tmp_path, *megabytes):
    """Files of so many MB, of short rows."""
    line = json_lines([SENTENCES])
    for size in megabytes:
        (tmp_path / f"{size}.jsonl").write_bytes(line * (size * 2**20 // len(line)))
        yield tmp_path / f"{size}.jsonl"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """The second peak is above the first by far less than the data that came between them."""
    first, second = peak_memory(tmp_path, "", *many_rows(tmp_path, 4, 24))
    assert second - first < 10, (first, second)


def one_line(tmp_path, ending, megabytes):
    """A file of one line of so many MB, and a short one."""
    text = SENTENCES * (megabytes * 2**20 // len(SENTENCES))
    file = tmp_path / f"line-{megabytes}{ending}"
    if ending == ".parquet":
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [text, SENTENCES]}), file)
    else:
        content = text.encode() if ending == ".txt" else json_lines([text, SENTENCES])
        file.write_bytes(COMPRESS[".zst" if ending.endswith(".zst") else ""](content))
    return file


@pytest.mark.slow
def test_memory_does_not_grow_with_a_line(tmp_path):
    """A text file's is used in pieces; of a row no more is read than is permitted, and nothing held of it.

    Parquet's library reads a row at once, before anything can be known of it.
    """
    files = [one_line(tmp_path, ".txt", 4), *(one_line(tmp_path, end, 50) for end in (".txt", ".jsonl", ".jsonl.zst"))]
    small, text, row, compressed, parquet = peak_memory(tmp_path, "", *files, one_line(tmp_path, ".parquet", 50))
    assert text - small < 20, (small, text)
    assert compressed - text < 100, (text, row, compressed)
    assert parquet - compressed < 300, (compressed, parquet)


@pytest.mark.slow
def test_memory_of_the_real_tokenizer_does_not_grow(tmp_path, toy_model_file):
    """Nor with a line, of which it would take 140 bytes per byte."""
    files = [*many_rows(tmp_path, 4, 16), one_line(tmp_path, ".jsonl", 8)]
    first, second, line = peak_memory(tmp_path, str(toy_model_file), *files)
    assert second - first < 5, (first, second)
    assert line - second < 200, (second, line)
