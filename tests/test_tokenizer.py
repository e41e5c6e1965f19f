import base64
import json
import os
import random
import re
import subprocess
import sys
import unicodedata

import pytest
import sentencepiece
from tokenizers import normalizers
from transformers import AutoTokenizer

from helpers import WORDS, shared
from pldr import STORIES, convert_checkpoint
from pldr.checkpoints.load import load_with_tokenizer
from pldr.tokenizer import _check_table, check_text, check_vocabulary, encode, load_tokenizer, train_sentencepiece

TRICKY = [
    "", "   ", " leading", "trailing ", "two  spaces", "tab\tsep\there", "new\nline\r\nand more\n", "\n",
    "emoji 😀 👍🏽 👩‍👩‍👧‍👦 🇹🇷 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "שלום עולם", "مرحبا بالعالم ١٢٣", "mixed שלום and English",
    "\u202eright to left override\u202c", "한국어 日本語テキスト", "é é ﬁ ﬂ ½ ２ ™ Å", "नमस्ते दुनिया", "ไทย ภาษา",
    "[END] [PAD] [START] [UNK] x[END]y", "a [SEP] b[CLS]c [CLS]", "<0x41> <0xE2>", "▁ under ▁x",
    "zero\u200bwidth\u200d\u200e", "\u0000control\u0007\x1b", "no\u00a0break\u3000space", "\ufeffBOM",
    "1234567890 3.14 2^10", "x" * 500, "ｶﾞｷﾞ", "\xa0\u200d", "a～b \u0344", "①②㍿ﷺ Ⅷ",
    *(unicodedata.normalize("NFD", text) for text in ("Tiếng Việt ngữ ế ộ", "한국어", "ガギグパピ", "Ελλάδα ΐ", "café Å", "ệ")),
]  # fmt: skip


def test_published_tokenizer_gives_sentencepiece_ids():
    file = shared("data/refinedweb-tokenizer.model")
    tokenizer, reference = load_tokenizer(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert len(tokenizer) == reference.vocab_size() == 32000
    lines = shared("data/wikitext-2/valid.txt").read_text(encoding="utf-8").splitlines()
    for text in lines + TRICKY + [f"{line} {tricky}" for line, tricky in zip(lines[1::50], TRICKY * 3, strict=False)]:
        assert tokenizer(text)["input_ids"] == reference.encode(text), repr(text)
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (
        0,
        1,
        2,
        3,
    )


@pytest.fixture
def pair(toy_model_file):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(toy_model_file))
    return load_tokenizer(toy_model_file), reference


def test_own_tokenizer_gives_sentencepiece_ids(pair):
    tokenizer, reference = pair
    for text in [*TRICKY, "the cat sat on a mat 12."]:
        assert tokenizer(text)["input_ids"] == reference.encode(text), repr(text)


def test_saved_and_loaded(pair, tmp_path):
    tokenizer, reference = pair
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for text in TRICKY:
        assert loaded(text)["input_ids"] == reference.encode(text), repr(text)
    assert loaded.padding_side == "left"
    assert loaded.eos_token == "[END]"


def test_decoding(pair):
    tokenizer, reference = pair
    for text in ("the cat sat", "wörld 😀 x", "a b  c"):
        assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
    assert tokenizer.decode([*reference.encode("the cat"), 3, 0], skip_special_tokens=True) == "the cat"


def test_control_pieces_in_text_are_text(pair):
    tokenizer, _ = pair
    assert 3 not in tokenizer("stop[END] here")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("[END]") == 3


def test_padding_on_the_left(pair):
    tokenizer, _ = pair
    batch = tokenizer(["the cat", "the cat sat on a mat"], padding=True)
    assert batch["input_ids"][0][0] == 0
    assert batch["attention_mask"][0][0] == 0
    assert batch["attention_mask"][1] == [1] * len(batch["input_ids"][1])


def test_text_that_is_not_utf8_is_an_error():
    with pytest.raises(ValueError, match="prompt: not valid UTF-8 at character 3"):
        check_text("abc\udcff", "prompt")
    assert check_text("grüße 😀", "prompt") == "grüße 😀"


def test_other_vocabulary_size(pair):
    with pytest.raises(ValueError, match="has 290 tokens, the model has vocab_size=97"):
        check_vocabulary(pair[0], 97)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json and no"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such tokenizer file"):
        load_tokenizer(tmp_path / "x.model")
    (tmp_path / "bad.model").write_bytes(b"\xff\xff\xff not a protobuf")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    (tmp_path / "bad.model").write_bytes(b"")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def pieces_of(file):
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    model.ParseFromString(file.read_bytes())
    return model


@pytest.mark.parametrize("lengths", [[513], [100_000], [400] * 500, [20] * 20_000])
def test_pieces_that_are_too_long(pair, toy_model_file, tmp_path, lengths):
    """They take hundreds of times as much memory as they are long, in either kind of file."""
    model = pieces_of(toy_model_file)
    for index, length in enumerate(lengths):
        model.pieces.add(piece=f"{index:x}".rjust(length, "x"), score=-9.0)
    (tmp_path / "long.model").write_bytes(model.SerializeToString())
    with pytest.raises(
        ValueError, match=rf"long\.model: damaged .*\(pieces of {lengths[0]} characters, \d+ in the mean"
    ):
        load_tokenizer(tmp_path / "long.model")
    pair[0].save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["model"]["vocab"] += [[piece.piece, piece.score] for piece in model.pieces[290:]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"damaged .* tokenizer \(pieces of {lengths[0]} characters, \d+ in the mean"):
        load_tokenizer(tmp_path)


def test_long_pieces_within_reason(toy_model_file, tmp_path):
    model = pieces_of(toy_model_file)
    for length in (512, 64, 64):
        model.pieces.add(piece=f"{len(model.pieces)}".rjust(length, "x"), score=-9.0)
    (tmp_path / "long.model").write_bytes(model.SerializeToString())
    assert len(load_tokenizer(tmp_path / "long.model")) == 293


def test_pieces_that_are_no_text(toy_model_file, tmp_path):
    (tmp_path / "bad.model").write_bytes(toy_model_file.read_bytes().replace(b"[UNK]", b"[\xff\xfeK]"))
    with pytest.raises(ValueError, match=r"bad\.model: damaged SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")


def test_a_panic_is_one_line(pair, tmp_path, capfd):
    """The library prints where it was, by itself, and raises what is no Exception."""
    pair[0].save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    (table,) = (step for step in fields["normalizer"]["normalizers"] if step["type"] == "Precompiled")
    table["precompiled_charsmap"] = 0
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"damaged or unsupported tokenizer \(Precompiled: Error.*\)$"):
        load_tokenizer(tmp_path)
    assert capfd.readouterr().err == ""
    os.write(2, b"still heard")
    assert capfd.readouterr().err == "still heard"


def test_a_panic_at_a_text_is_one_line(pair, tmp_path, capfd):
    """A pattern can be one that takes for ever at some text, which the library gives up with a panic."""
    pair[0].save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": "b"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(tmp_path)
    assert encode(tokenizer, ["the cat", "a"]) == pair[0](["the cat", "a"])["input_ids"]
    for texts in ("x" * 40, ["a", "x" * 40]):
        with pytest.raises(
            ValueError, match=rf"^{re.escape(str(tmp_path))}: fails at a text \(.*retry-limit-in-match over\)$"
        ):
            encode(tokenizer, texts)
    assert capfd.readouterr().err == ""


def test_a_table_of_characters_that_is_cut_off(pair, toy_model_file, tmp_path):
    """The library would make room for the four thousand million bytes that it says it has."""
    table = b"\xfc\xff\xff\xff" + bytes(8)
    model = pieces_of(toy_model_file)
    model.normalizer_spec.precompiled_charsmap = table
    (tmp_path / "cut.model").write_bytes(model.SerializeToString())
    pair[0].save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "tokenizer.json"
    fields = json.loads(file.read_text())
    for step in fields["normalizer"]["normalizers"]:
        if step["type"] == "Precompiled":
            step["precompiled_charsmap"] = base64.b64encode(table).decode()
    file.write_text(json.dumps(fields))
    for place in ("cut.model", "folder"):
        with pytest.raises(ValueError, match=rf"{place}: damaged .*a table of characters that is cut off"):
            load_tokenizer(tmp_path / place)


def table_of(pair):
    steps = json.loads(pair[0].backend_tokenizer.to_str())["normalizer"]["normalizers"]
    return next(base64.b64decode(step["precompiled_charsmap"]) for step in steps if step["type"] == "Precompiled")


def test_tables_of_characters_that_pass_lead_no_text_astray(pair, capfd):
    """The library would panic at the first text that leads out of a table, long after the tokenizer was loaded."""
    whole, dice = table_of(pair), random.Random(0)
    _check_table(whole)
    texts = [chr(code) for code in range(1, 0x20000) if not 0xD800 <= code < 0xE000]
    refused = 0
    for _ in range(15):
        table = bytearray(whole)
        table[dice.randrange(4, len(table))] ^= 1 << dice.randrange(8)
        try:
            _check_table(bytes(table))
        except ValueError:
            refused += 1
        else:
            normalizer = normalizers.Precompiled(bytes(table))
            for text in texts:
                normalizer.normalize_str(text)
    assert 0 < refused < 15
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("place", "number", "message"),
    [
        (0, 0xFFFFFC00, "leads out of itself"),  # the root's children
        ("leaf", 0x80000000 | 5_000_000, "leads to no text"),
    ],
)
def test_a_table_of_characters_that_leads_astray(pair, toy_model_file, tmp_path, place, number, message):
    table = bytearray(table_of(pair))
    numbers = memoryview(table)[4 : 4 + int.from_bytes(table[:4], "little")].cast("I")
    if place == "leaf":
        place = next(index for index, value in enumerate(numbers) if value >> 31)
    numbers[place] = number
    numbers.release()
    model = pieces_of(toy_model_file)
    model.normalizer_spec.precompiled_charsmap = bytes(table)
    (tmp_path / "astray.model").write_bytes(model.SerializeToString())
    with pytest.raises(
        ValueError, match=rf"astray\.model: damaged SentencePiece model \(a table of characters that {message}"
    ):
        load_tokenizer(tmp_path / "astray.model")


@pytest.mark.parametrize(
    ("name", "value"), [("model_max_length", "many"), ("eos_token", "\ud800"), ("padding_side", "up")]
)
def test_settings_that_would_fail_later(pair, tmp_path, name, value):
    """In the first text, or where the tokenizer is saved."""
    pair[0].save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(ValueError, match=rf"{tmp_path}: damaged or unsupported tokenizer"):
        load_tokenizer(tmp_path)


def test_what_is_said_while_loading_is_heard(pair, tmp_path, capfd, monkeypatch):
    pair[0].save_pretrained(tmp_path)
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained", lambda *_, **__: os.write(2, b"a warning") and pair[0]
    )
    assert load_tokenizer(tmp_path) is pair[0]
    assert capfd.readouterr().err == "a warning"


def test_the_configuration_beside_it_is_not_read(pair, tmp_path):
    """It may be of any model: here it would make as many labels as it says."""
    pair[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_labels": "many"}')
    assert len(load_tokenizer(tmp_path)) == 290


def test_impossible_vocabulary_leaves_nothing(tmp_path):
    with pytest.raises(
        ValueError, match=r"^vocab_size: 5000 does not work for this text: Vocabulary size too high \(5000\)"
    ):
        train_sentencepiece(["a few words only"], tmp_path / "t.model", vocab_size=5000)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_tokenizer_loads_without_a_word():
    """Also where it is the first thing that a process does."""
    code = "import pldr; pldr.load_tokenizer(pldr.STORIES)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout + result.stderr == ""


def test_streamed_pieces_add_up(pair):
    """Whatever the model says, also broken bytes and special tokens: the pieces are the text, each final when shown."""
    import torch

    from pldr.generation import TextStreamer

    tokenizer, _ = pair
    generator = torch.Generator().manual_seed(0)
    emoji = tokenizer("😀")["input_ids"]
    for length in range(1, 30):
        ids = torch.randint(len(tokenizer), (length,), generator=generator).tolist() + emoji + [0]
        pieces = []
        prompt = tokenizer("the cat")["input_ids"]
        streamer = TextStreamer(tokenizer, pieces.append, prompt)
        streamer.put(torch.tensor([prompt]))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert "the cat" + "".join(pieces) == tokenizer.decode(prompt + ids, skip_special_tokens=True)


def test_a_tokenizer_folder_runs_no_code(tmp_path, monkeypatch):
    """Even where standard input would say yes to transformers' question."""
    import io

    marker = tmp_path / "owned"
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    for fields in ({"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}, {"tokenizer_class": "Evil"}):
        fields |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
        with pytest.raises(ValueError, match="damaged or unsupported tokenizer"):
            load_tokenizer(tmp_path)
    assert not marker.exists()


def test_streaming_a_byte_level_tokenizer():
    """One that cuts characters inside ordinary tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    from pldr.generation import TextStreamer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({character: index for index, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    pieces = []
    import torch

    prompt = tokenizer("x")["input_ids"]
    streamer = TextStreamer(tokenizer, pieces.append, prompt)
    streamer.put(torch.tensor([prompt]))
    for token in tokenizer("a😀b é")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(pieces) == "a😀b é"


@pytest.mark.parametrize("text", ["the cat sat on a mat", "  see   him\n at  her house ", "[END] and <0x41> [PAD]", "grüße 😀 123",
                                  "", "xyzzy catdog", "the the\u3000the"])  # fmt: skip
def test_bpe_gives_the_ids_of_sentencepiece(tmp_path, text):

    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 4
    file = train_sentencepiece(texts, tmp_path / "bpe.model", 320, "bpe")
    tokenizer, reference = load_tokenizer(file), sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
    assert tokenizer.decode(reference.encode(text)) == reference.decode(reference.encode(text))
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_unknown_model_type(tmp_path):
    with pytest.raises(ValueError, match="must be unigram or bpe, got 'word'"):
        train_sentencepiece(["a b"], tmp_path / "x.model", 300, "word")


def test_its_longest_text_is_the_models_context(folder, tmp_path):
    """Where it is loaded with a model, and where it is written beside one."""
    _, tokenizer = load_with_tokenizer(folder)
    assert tokenizer.model_max_length == 64
    convert_checkpoint(folder, tmp_path / "converted")
    assert AutoTokenizer.from_pretrained(tmp_path / "converted").model_max_length == 64
    assert len(tokenizer("cat " * 100, truncation=True).input_ids) == 64
    assert AutoTokenizer.from_pretrained(STORIES).model_max_length == 1024
