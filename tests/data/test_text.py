"""Text conditions: tokens against a plain BPE, pretrained encoders against transformers."""

import ast
import json
import multiprocessing
import os
import pickle
import shutil
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf
from torch.testing import assert_close

from src.config.search_path import CONF
from tests.loops import for_each


@pytest.fixture(scope="module", autouse=True)
def heavy_imports() -> None:
    """Import slow modules here, not at collection."""
    global fingerprint_of, pretrained, text, InMemory, Pretrained, Tokens
    from src.data import pretrained, text
    from src.data.encoder_files import fingerprint_of
    from src.data.pretrained import Pretrained
    from src.data.sources import InMemory
    from src.data.text import Tokens


pytest.importorskip("tokenizers")

COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle")
CAPTIONS = [
    [f"a {color} {shape}", f"A  {shape} that is {color}", f"there is a {size} {color} {shape} on a black background"]
    for color in COLORS
    for shape in SHAPES
    for size in ("small", "large")
]
ANY_TEXT = [
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family",
    "a\x00b\x1fc",
    "x" * 40,
    "½ ﬁne",
    "${oc.env:HOME}",
    "<pad> [END] </s>",
]


def captioned(captions=CAPTIONS):
    return InMemory(torch.zeros(len(captions), 2), captions=captions)


def opened(captions=CAPTIONS, **settings):
    """Return Tokens with settings inferred from these captions."""
    return Tokens(**{"max_length": 64, **settings, **Tokens.infer_settings(captioned(captions), settings)})


@pytest.fixture(scope="module")
def tokens():
    return opened(vocab_size=400)


def byte_alphabet():
    """Return GPT-2's character for each byte: itself if printable, else the next from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return {byte: chr(byte if byte in printable else next(others)) for byte in range(256)}


def normal(text):
    import unicodedata

    return " ".join(unicodedata.normalize("NFKC", text).lower().split())


# Tokens


def test_tokens_match_a_plain_bpe(tokens):
    """In each word, repeatedly merge the pair that was learned first."""
    found = Tokens.infer_settings(captioned(), {"vocab_size": 400})
    model = json.loads(found["tokenizer"])["model"]
    order = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    letters = byte_alphabet()
    for prompt in ("a small red square on a blue background", "yellow triangles", "Unseen wording, zebra"):
        expected = [1]
        for word in prompt.lower().replace(",", " ,").split():
            blank = "" if word == "," else " "
            parts = [letters[byte] for byte in (blank + word).encode()]
            while pairs := [(order[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in order]:
                _, i = min(pairs)
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            expected += [3 + model["vocab"][part] for part in parts]
        expected.append(2)
        assert tokens([prompt])[0].tolist() == expected + [0] * (64 - len(expected))


@pytest.mark.parametrize("prompt", ANY_TEXT)
def test_tokens_decode_to_the_text(tokens, prompt):
    vocab_size = json.loads(Tokens.infer_settings(captioned(), {"vocab_size": 400})["tokenizer"])["model"]["vocab"]
    spelled = {number: letters for letters, number in vocab_size.items()}
    bytes_of = {letter: byte for byte, letter in byte_alphabet().items()}
    ids = [number for number in tokens([prompt])[0].tolist() if number]
    assert ids[0] == 1 and ids[-1] == 2 and min(ids[1:-1]) >= 3  # no text contains special tokens
    letters = "".join(spelled[number - 3] for number in ids[1:-1])
    assert bytes(bytes_of[letter] for letter in letters).decode() == f" {normal(prompt)}"


def test_invalid_unicode_is_encoded(tokens):
    assert_close(tokens(["caf\udce9"]), tokens(["caf?"]))


def test_the_smallest_vocabulary_is_the_bytes():
    plain, learned = opened(vocab_size=259), opened(vocab_size=600)
    ids = plain(["Red Ö"])[0]
    assert (ids != 0).sum() == 1 + len(" red ö".encode()) + 1
    caption = CAPTIONS[5][2]
    assert (learned([caption]) != 0).sum() < (plain([caption]) != 0).sum() / 3
    assert ids.max() < 259
    with pytest.raises(ValueError, match=r"vocab_size=258 must be at least 259"):
        opened(vocab_size=258)


def test_none_is_encoded_as_the_blank_text(tokens):
    ids = tokens([None, "", " \t\n"])
    assert ids.dtype == torch.int64
    assert ids.tolist() == [[1, 2] + [0] * 62] * 3
    assert tokens([]).shape == (0, 64)


def test_case_spaces_and_unicode_forms_are_normalized(tokens):
    same = tokens(["a red ﬁne circle", "  A Red\u00a0\u3000FINE\n circle "])
    assert_close(same[0], same[1])
    assert (same[0] != tokens(["a red fine square"])[0]).any()
    assert_close(tokens([7, 2.5]), tokens(["7", "2.5"]))  # YAML parses these as numbers


@pytest.mark.parametrize("prompt", [["a"], True, {"a": 1}])
def test_other_values_than_texts_raise(tokens, prompt):
    with pytest.raises(ValueError, match="is not a string") as error:
        tokens([prompt])
    assert "\n" not in str(error.value)


def test_tokenizer_training_is_deterministic():
    found = [Tokens.infer_settings(captioned(), {"vocab_size": 500}) for _ in range(3)]
    assert found[0] == found[1] == found[2]


def test_inferred_settings_survive_a_configuration(tokens):
    captions = [["pay ${amount} or ${amount:5} now"], ["${amount}"]] * 3
    found = Tokens.infer_settings(captioned(captions), {"vocab_size": 400})
    assert "${" in json.dumps(json.loads(found["tokenizer"]), ensure_ascii=False)  # learned as one token
    assert found["tokenizer"].isascii()
    cfg = OmegaConf.create({"tokenizer": found["tokenizer"]})
    read = OmegaConf.create(OmegaConf.to_yaml(cfg)).tokenizer
    assert read == found["tokenizer"]
    assert_close(Tokens(read, vocab_size=400)(["${amount}"]), opened(captions, vocab_size=400)(["${amount}"]))


def test_given_settings_are_kept():
    other = Tokens.infer_settings(captioned([["something else"]]), {"vocab_size": 300})["tokenizer"]
    found = Tokens.infer_settings(captioned(), {"tokenizer": other, "examples": ["a cat"], "vocab_size": 300})
    assert found == {"tokenizer": other, "examples": ["a cat"]}


def test_long_texts_are_truncated_with_one_warning():
    tokens = opened(max_length=6, vocab_size=259)
    with pytest.warns(
        UserWarning, match=r"conditioning\.encode\.max_length=6 truncates text of 8 tokens to 4"
    ) as warned:
        ids = tokens(["abcdefg", "hijklmnop"])
    assert len(warned) == 1
    assert ids[0].tolist() == [1, *(3 + i for i in tokens._tokenizer.encode("abc").ids), 2]
    assert_close(ids[:1], tokens(["abc"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokens(["a still longer one"])


class Lazy:
    """Captions of a million samples; records which are read."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(index)
        self.read.append(index)
        return [f"picture {index}", f"number {index}"]


def test_large_data_are_subsampled_evenly(monkeypatch):
    lazy = Lazy()
    monkeypatch.setattr(text, "MAX_CAPTIONS", 100)
    examples = Tokens.infer_settings(InMemory(torch.zeros(1, 2), captions=lazy), {"vocab_size": 300})["examples"]
    assert lazy.read == list(range(0, 1_000_000, 10_000))
    assert len(set(examples)) == 8


def test_examples_are_distinct_and_spread():
    examples = opened(vocab_size=300).examples
    assert len(set(examples)) == 8
    assert sum(color in " ".join(examples) for color in COLORS) >= 3
    odd = [["one"]] * 50 + [["t\x07wo", "o  ne", "${two}"], ["two"]]
    assert opened(odd, vocab_size=300).examples == ["one", "o ne", "two"]  # valid in a configuration


def test_any_caption_of_a_sample_can_be_chosen(tokens):
    source = captioned()
    for condition in (tokens, Pretrained("x", features=2, fingerprint="x")):
        assert [condition.of_sample(source, 3, choice) for choice in range(4)] == [*CAPTIONS[3], CAPTIONS[3][0]]
        assert condition.of_sample(captioned([[]]), 0, 5) == ""
        assert condition.title(None) == condition.title(" ") == "no text"
        assert condition.title("A  cat") == "A cat"
        assert len(condition.title("cats " * 99)) <= 100


@for_each("condition", lambda: [Tokens, Pretrained])
def test_data_without_captions_raise(condition):
    for captions, message in ((None, "needs data with captions"), ([["", " "]], "captions of the data are blank")):
        if condition is Pretrained and captions:
            continue
        with pytest.raises(ValueError, match=message) as error:
            condition.infer_settings(captioned(captions) if captions else InMemory(torch.zeros(3, 2)), {"model": "x"})
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer": None}, "encode.tokenizer is empty"),
        ({"tokenizer": "{"}, "is not JSON of the tokenizers library"),
        ({"vocab_size": 300}, "vocab_size=300 must be at least 322"),
        ({"max_length": 2}, "max_length=2 must be at least 3"),
    ],
)
def test_invalid_settings_of_tokens_raise(settings, message):
    found = Tokens.infer_settings(captioned(), {"vocab_size": 400})
    with pytest.raises(ValueError, match=message) as error:
        Tokens(**{**found, "vocab_size": 400, **settings})
    assert "\n" not in str(error.value)


def encode_in_worker(tokens, queue):
    queue.put(tokens(["a red circle"]).tolist())


def test_workers_encode_equally_without_warnings(capfd):
    tokens = opened(vocab_size=400)
    expected = tokens(["a red circle"]).tolist()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    worker = context.Process(target=encode_in_worker, args=(tokens, queue))
    worker.start()
    assert queue.get() == expected
    worker.join()
    assert capfd.readouterr().err == ""
    assert pickle.loads(pickle.dumps(tokens))(["a red circle"]).tolist() == expected


@pytest.mark.parametrize("package", ["tokenizers", "transformers"])
def test_missing_packages_are_named(package, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    architecture = Tokens if package == "tokenizers" else Pretrained
    with pytest.raises(ValueError, match=f"pip install {package}"):
        architecture.infer_settings(captioned(), {"model": "openai/clip-vit-large-patch14", "cache": str(tmp_path)})


def test_optional_packages_are_imported_lazily():
    for path in Path(pretrained.__file__).parents[1].rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {"tokenizers", "transformers", "huggingface_hub"}, path


# Pretrained encoders: tiny, with random weights

WORDS = sorted({word for several in CAPTIONS for caption in several for word in caption.lower().split()})


def save_tokenizer(folder, ends=True):
    """Save a tokenizer with the words of the captions as vocabulary."""
    import tokenizers
    import transformers

    vocab_size = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab_size, unk_token="<unk>"))
    inner.normalizer = tokenizers.normalizers.Lowercase()
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if ends:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    special = {"pad_token": "<pad>", "bos_token": "<s>"} if ends else {}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", unk_token="<unk>", **special
    ).save_pretrained(folder)
    return len(vocab_size)


def make(architecture, folder, seed=0):
    """Save a model, and return its text encoder."""
    transformers = pytest.importorskip("transformers")
    size = save_tokenizer(folder, ends=architecture != "gpt2")
    torch.manual_seed(seed)
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    if architecture in ("clip", "clip text"):
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        config = transformers.CLIPTextConfig(vocab_size=size, max_position_embeddings=20, **small, **ends)
        if architecture == "clip text":
            net = part = transformers.CLIPTextModel(config)
        else:
            sight = transformers.CLIPVisionConfig(**small, image_size=8, patch_size=4)
            net = transformers.CLIPModel(
                transformers.CLIPConfig(text_config=config.to_dict(), vision_config=sight.to_dict(), projection_dim=8)
            )
            part = net.text_model
    elif architecture in ("t5", "t5 in parts"):
        config = transformers.T5Config(vocab_size=size, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
        net = transformers.T5ForConditionalGeneration(config)
        part = net.encoder
    elif architecture == "bert":
        net = part = transformers.BertModel(transformers.BertConfig(vocab_size=size, **small))
    else:
        net = part = transformers.GPT2Model(transformers.GPT2Config(vocab_size=size, n_embd=16, n_layer=2, n_head=2))
    net.save_pretrained(folder, max_shard_size="20KB" if architecture == "t5 in parts" else "1GB")
    assert (folder / "model.safetensors").exists() != (architecture == "t5 in parts")
    return part.eval()


ARCHITECTURES = ["clip", "clip text", "t5", "t5 in parts", "bert", "gpt2"]


def encoder(folder, cache, captions=CAPTIONS, **settings):
    settings = {"model": str(folder), "max_length": 16, "cache": str(cache), "device": "cpu", **settings}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*encodes the captions")
        return {**settings, **Pretrained.infer_settings(captioned(captions), settings)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings_match_transformers_and_stay_cached(architecture, tmp_path):
    part = make(architecture, tmp_path / "model")
    settings = encoder(tmp_path / "model", tmp_path / "cache")
    assert settings["features"] == 16
    assert len(set(settings["examples"])) == 8
    prompt = ["a red circle", None, CAPTIONS[3][2], "a red circle", " "]
    found = Pretrained(**settings)(prompt)
    assert found.dtype == torch.float32
    assert found.shape == (5, 16, 16)
    words = ["a red circle", "", CAPTIONS[3][2], "a red circle", ""]
    for row, each in zip(found, words, strict=True):  # one at a time, without padding
        ids = [4 + WORDS.index(word) for word in each.lower().split()]
        ids = [1, *ids, 2] if architecture != "gpt2" else ids or [2]
        with torch.no_grad():
            expected = part(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert_close(row[: len(ids)], expected, rtol=2e-3, atol=2e-3)  # float16 has 11 bits
        assert (row[len(ids) :] == 0).all()
        assert row[: len(ids)].any(1).all()

    shutil.rmtree(tmp_path / "model")
    again = pickle.loads(pickle.dumps(Pretrained(**settings)))
    assert_close(again(prompt), found, rtol=0, atol=0)
    for several in CAPTIONS:
        again(several)
    again(settings["examples"])
    with pytest.raises(ValueError, match=r"conditioning\.encode\.model=.* is neither a folder") as error:
        again(["a text without cached embeddings"])
    assert "\n" not in str(error.value)


def test_new_texts_are_cached_too(tmp_path, monkeypatch):
    make("clip text", tmp_path / "model")
    settings = encoder(tmp_path / "model", tmp_path / "cache")
    monkeypatch.setattr(pretrained, "_Encoder", None)  # fails if an encoder is opened
    Pretrained(**settings)(CAPTIONS[0])
    monkeypatch.undo()
    found = Pretrained(**settings)(["circle circle circle"])
    monkeypatch.setattr(pretrained, "_Encoder", None)
    assert_close(Pretrained(**settings)(["circle  circle circle"]), found, rtol=0, atol=0)


def test_the_next_run_encodes_no_caption_again(tmp_path, monkeypatch):
    make("t5", tmp_path / "model")
    first = encoder(tmp_path / "model", tmp_path / "cache")
    monkeypatch.setattr(pretrained, "_Encoder", None)
    assert encoder(tmp_path / "model", tmp_path / "cache") == first
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere")
    moved = encoder(tmp_path / "elsewhere", tmp_path / "cache")
    assert moved["fingerprint"] == first["fingerprint"]


def test_texts_are_truncated_to_max_length(tmp_path):
    part = make("clip text", tmp_path / "model")
    with pytest.warns(UserWarning, match=r"conditioning\.encode\.max_length=4 truncates text of 12 tokens"):
        settings = encoder(tmp_path / "model", tmp_path / "cache", max_length=4)
    found = Pretrained(**settings)([CAPTIONS[0][2]])
    ids = [1, *(4 + WORDS.index(word) for word in CAPTIONS[0][2].split()[:2]), 2]
    with torch.no_grad():
        expected = part(input_ids=torch.tensor([ids])).last_hidden_state
    assert_close(found, expected, rtol=2e-3, atol=2e-3)
    with pytest.raises(ValueError, match=r"conditioning\.encode\.max_length=21 must be in \[1, 20\]"):
        encoder(tmp_path / "model", tmp_path / "cache", max_length=21)


def test_a_replaced_encoder_is_detected(tmp_path):
    make("clip text", tmp_path / "model")
    settings = encoder(tmp_path / "model", tmp_path / "cache")
    make("clip text", tmp_path / "model", seed=1)
    Pretrained(**settings)(CAPTIONS[0])  # cached from the first encoder
    with pytest.raises(ValueError, match="is not the encoder that this run was trained with") as error:
        Pretrained(**settings)(["another text"])
    assert "\n" not in str(error.value)
    assert encoder(tmp_path / "model", tmp_path / "cache")["fingerprint"] != settings["fingerprint"]


def test_the_fingerprint_depends_on_each_weight(tmp_path):
    import safetensors.torch

    make("bert", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    before = fingerprint_of(tmp_path)
    for name, weight in weights.items():
        safetensors.torch.save_file({**weights, name: weight + 1}, path)
        assert fingerprint_of(tmp_path) != before, name
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    assert fingerprint_of(tmp_path) == before


def remove_weight(folder):
    import safetensors.torch

    weights = safetensors.torch.load_file(folder / "model.safetensors")
    lost = next(name for name in sorted(weights) if "layer_norm2" in name)
    del weights[lost]
    safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})


def set_model_type(folder, model_type):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "neither a folder"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json;"),
        (lambda folder: (folder / "model.safetensors").rename(folder / "x.bin"), "has no model.safetensors;"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json;"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer .* cannot be opened"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 50), "model.safetensors is corrupted"),
        (lambda folder: os.truncate(folder / "model.safetensors", 9000), "model.safetensors is corrupted"),
        (
            lambda folder: (folder / "model.safetensors").rename(folder / "model.safetensors.index.json"),
            "lists no weight files",
        ),
        (remove_weight, "lack 1 of the encoder's"),
        (lambda folder: set_model_type(folder, "unheard_of"), "transformers library does not know"),
        (lambda folder: set_model_type(folder, "dinov2"), "is a dinov2 without a text encoder"),
    ],
)
def test_damaged_encoders_raise(tmp_path, damage, message, no_network):
    make("clip text", tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=message) as error:
        encoder(tmp_path / "model", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_a_failed_download_raises(tmp_path, no_network, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(ValueError, match=r"conditioning\.encode\.model=nobody/no-clip.*config\.json") as error:
        encoder("nobody/no-clip", tmp_path / "cache")
    assert "\n" not in str(error.value)


def test_pretrained_needs_inferred_settings():
    with pytest.raises(ValueError, match="features and fingerprint"):
        Pretrained("openai/clip-vit-large-patch14")


# Configurations


@pytest.mark.parametrize("name", ["text", "pretrained"])
def test_configurations_list_all_arguments_and_fit_together(name, tmp_path):
    import inspect

    if name == "pretrained":
        make("t5", tmp_path / "model")
    cfg = OmegaConf.create({"conditioning": OmegaConf.load(CONF / "conditioning" / f"{name}.yaml")})
    encode, embed = cfg.conditioning.encode, cfg.conditioning.embed
    for node in (encode, embed):
        missing = set(inspect.signature(get_method(node._target_)).parameters) - set(node) - {"dim"}
        assert not missing
    if name == "pretrained":
        encode.model, encode.cache, encode.device = str(tmp_path / "model"), str(tmp_path / "cache"), "cpu"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*encodes the captions")
        encode.update(get_method(encode._target_).infer_settings(captioned(), OmegaConf.to_container(encode)))
    condition, net = instantiate(encode), instantiate(embed)(dim=24)
    vector, tokens, mask = net(condition([None, *condition.examples]))
    assert vector.shape == (9, 24)
    assert tokens.shape == (9, encode.max_length, net.token_width)
    assert mask.shape == (9, encode.max_length)
    assert mask.any(1).all() and not mask.all(1).any()
