"""Round trips, determinism, streaming, foreign tokenizer files."""

import json

import pytest
import tokenizers
from corpora import sentences
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from mlm_mpi.data.tokenizer import StreamDecoder, Tokenizer
from mlm_mpi.errors import ConfigError, DataError

TEXTS = [sentences(seed, 200) + "Größe 東京 🙂\n" for seed in range(20)]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request):
    return Tokenizer.bytes() if request.param == "bytes" else Tokenizer.train(TEXTS, 400)


@given(st.text(max_size=50))
def test_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.encode_batch([text, text]) == [ids, ids]


@settings(max_examples=200)
@given(st.data())
def test_stream_equals_decode_and_shows_only_whole_characters(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = StreamDecoder(tokenizer)
    text = "".join([stream.push(i) for i in ids] + [stream.flush()])
    assert text == tokenizer.decode(ids)


def test_stream_holds_back_a_part_of_a_character():
    tokenizer = Tokenizer.bytes()
    stream = StreamDecoder(tokenizer)
    assert [stream.push(i) for i in tokenizer.encode("a€")] == ["a", "", "", "€"]
    assert stream.push(0xE2) == "" and stream.flush() == "\ufffd"


def test_bytes_are_their_own_ids():
    tokenizer = Tokenizer.bytes()
    assert tokenizer.encode("aé\n") == list("aé\n".encode())
    assert (tokenizer.vocab_size, tokenizer.eot) == (257, 256)


def test_end_of_text_in_a_text_is_text(tokenizer):
    ids = tokenizer.encode("x <|endoftext|> y")
    assert tokenizer.eot not in ids
    assert tokenizer.decode(ids) == "x <|endoftext|> y"
    assert tokenizer.decode([*ids, tokenizer.eot]) == "x <|endoftext|> y"


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_training_twice_gives_the_same_bytes(monkeypatch, parallel):
    first = Tokenizer.train(TEXTS, 600)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    second = Tokenizer.train(iter(TEXTS), 600)
    assert first.content == second.content and first.hash == second.hash
    assert 257 < first.vocab_size <= 600


def test_save_and_load_keep_every_byte(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "t.json")
    loaded = Tokenizer.load(tmp_path / "t.json")
    assert loaded.hash == tokenizer.hash and loaded.content == (tmp_path / "t.json").read_bytes()
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_a_foreign_tokenizer_json(tmp_path):
    inner = tokenizers.Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 7, "ba": 1, "bo": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["</s>"])
    inner.enable_truncation(2)
    inner.save(str(tmp_path / "hf.json"))
    tokenizer = Tokenizer.load(tmp_path / "hf.json")
    assert (tokenizer.eot, tokenizer.vocab_size) == (7, 8)
    assert tokenizer.encode("ba bo ba x") == [1, 2, 1, 0]
    stream = StreamDecoder(tokenizer)
    assert "".join([stream.push(i) for i in (1, 2, 1)] + [stream.flush()]) == tokenizer.decode([1, 2, 1]) == "ba bo ba"


def test_a_foreign_tokenizer_with_byte_fallback_streams():
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"</s>": 256, "a": 257}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    inner.add_special_tokens(["</s>"])
    tokenizer = Tokenizer(inner.to_str().encode())
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("a€a")
    assert [stream.push(i) for i in ids] == ["a", "", "", "€", "a"]


@pytest.mark.parametrize("content", [b"", b"\xff", b"{}", b'{"version": "1.0"}', json.dumps([1]).encode()])
def test_what_is_no_tokenizer_says_so(tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(DataError, match=r"bad\.json is not a tokenizer\.json") as caught:
        Tokenizer.load(tmp_path / "bad.json")
    assert "\n" not in str(caught.value)


def test_missing_file_missing_end_and_small_vocabulary(tmp_path):
    with pytest.raises(DataError, match="cannot read the tokenizer"):
        Tokenizer.load(tmp_path / "none.json")
    endless = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str().encode()
    with pytest.raises(DataError, match="no token that ends a text"):
        Tokenizer(endless)
    with pytest.raises(ConfigError, match="--vocab 256 is below 257"):
        Tokenizer.train(TEXTS, 256)
