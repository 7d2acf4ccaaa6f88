"""Records what PyTorch's TransformerEncoderLayer and TransformerDecoderLayer compute in a small model, float64: losses,
with smoothed targets and without, and every gradient.

    /tmp/torchenv/bin/python tests/golden/make_encoder_decoder.py      # the environment: see benchmarks/torch_peer.py

The weights are drawn by `golden_weights` on both sides and not stored. There texts are padded, here they lie one behind
the other.
"""

from pathlib import Path

import numpy as np
from make_llama import golden_weights

from mlm_mpi.models import encoder_decoder

FILE = Path(__file__).parent / "encoder_decoder.npz"
VOCABULARY, EPSILON, SMOOTHING = 53, 1e-5, 0.1
SETTINGS = encoder_decoder.Settings(
    layers=2, decoder_layers=3, width=24, heads=4, context=16, feed_forward=40, dropout=0.0, norm_epsilon=EPSILON
).resolved()
SOURCES, TARGETS = (5, 5, 16, 1), (7, 7, 2, 12)  # tokens of each text, ends of text among them


def texts() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each pair the source, what the decoder reads, what it has to find."""
    random = np.random.default_rng(2028)
    some = []
    for length, other in zip(SOURCES, TARGETS, strict=True):
        source, target = random.integers(0, VOCABULARY, length), random.integers(0, VOCABULARY, other + 1)
        some.append((source, target[:-1], target[1:]))
    return some


def shapes() -> dict[str, tuple[int, ...]]:
    """Our names and shapes, written out so that nothing but the draws is shared."""
    c, f = SETTINGS.width, SETTINGS.feed_forward
    out: dict[str, tuple[int, ...]] = {"embed.tokens": (VOCABULARY, c)}
    out |= {f"embed.{side}.positions": (SETTINGS.context, c) for side in ("target", "source")}
    for half, layers, norms in (("encoder", SETTINGS.layers, 2), ("decoder", SETTINGS.decoder_layers, 3)):
        for i in range(layers):
            name = f"{half}.block{i}"
            for norm in range(1, norms + 1):
                out |= {f"{name}.norm{norm}.gain": (c,), f"{name}.norm{norm}.bias": (c,)}
            maps = {"attention.qkv": (c, 3, c), "attention.project": (c, c)}
            if half == "decoder":
                maps |= {"cross.query": (c, c), "cross.key_value": (c, 2, c), "cross.project": (c, c)}
            maps |= {"feed_forward.up": (c, f), "feed_forward.down": (f, c)}
            for key, shape in maps.items():
                out |= {f"{name}.{key}.weight": shape, f"{name}.{key}.bias": shape[1:]}
        out |= {f"{half}.final.norm.gain": (c,), f"{half}.final.norm.bias": (c,)}
    return out


def main() -> None:
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    ours = {name: torch.from_numpy(golden_weights(name, shape)).requires_grad_() for name, shape in shapes().items()}

    def matrix(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        weight = ours[f"{name}.weight"]
        return weight.reshape(weight.shape[0], -1).T, ours[f"{name}.bias"].reshape(-1)

    def layer(half: str, number: int) -> tuple[nn.Module, dict[str, torch.Tensor]]:
        """A layer of PyTorch's and its parameters, functions of ours."""
        kind = nn.TransformerEncoderLayer if half == "encoder" else nn.TransformerDecoderLayer
        made = kind(
            SETTINGS.width, SETTINGS.heads, SETTINGS.feed_forward, 0.0, lambda x: F.gelu(x, approximate="tanh"),
            EPSILON, batch_first=True, norm_first=True,
        )  # fmt: skip
        name, values = f"{half}.block{number}", {}
        for theirs, key in (("linear1", "feed_forward.up"), ("linear2", "feed_forward.down"),
                            ("self_attn.out_proj", "attention.project")):  # fmt: skip
            values[f"{theirs}.weight"], values[f"{theirs}.bias"] = matrix(f"{name}.{key}")
        values["self_attn.in_proj_weight"], values["self_attn.in_proj_bias"] = matrix(f"{name}.attention.qkv")
        if half == "decoder":
            parts = [matrix(f"{name}.cross.{key}") for key in ("query", "key_value")]
            values["multihead_attn.in_proj_weight"] = torch.cat([weight for weight, _ in parts])
            values["multihead_attn.in_proj_bias"] = torch.cat([bias for _, bias in parts])
            out = matrix(f"{name}.cross.project")
            values["multihead_attn.out_proj.weight"], values["multihead_attn.out_proj.bias"] = out
        for norm in range(1, 4 if half == "decoder" else 3):
            values[f"norm{norm}.weight"] = ours[f"{name}.norm{norm}.gain"]
            values[f"norm{norm}.bias"] = ours[f"{name}.norm{norm}.bias"]
        assert set(values) == {name for name, _ in made.named_parameters()}
        return made, values

    def final(half: str, x: torch.Tensor) -> torch.Tensor:
        gain, bias = ours[f"{half}.final.norm.gain"], ours[f"{half}.final.norm.bias"]
        return F.layer_norm(x, (SETTINGS.width,), gain, bias, EPSILON)

    def padded(arrays: list[np.ndarray], value: int) -> torch.Tensor:
        return nn.utils.rnn.pad_sequence([torch.from_numpy(array) for array in arrays], True, value)

    def embedded(ids: torch.Tensor, side: str) -> torch.Tensor:
        return ours["embed.tokens"][ids] + ours[f"embed.{side}.positions"][: ids.shape[1]]

    sources, read, wanted = ([pair[k] for pair in texts()] for k in range(3))
    ids, inputs, targets = padded(sources, 0), padded(read, 0), padded(wanted, -100)
    hidden = torch.arange(ids.shape[1])[None] >= torch.tensor(SOURCES)[:, None]
    memory = embedded(ids, "source")
    for number in range(SETTINGS.layers):
        made, values = layer("encoder", number)
        memory = torch.func.functional_call(made, values, (memory,), {"src_key_padding_mask": hidden})
    memory, x = final("encoder", memory), embedded(inputs, "target")
    later = torch.triu(torch.ones(inputs.shape[1], inputs.shape[1], dtype=torch.bool), 1)
    for number in range(SETTINGS.decoder_layers):
        made, values = layer("decoder", number)
        how = {"tgt_mask": later, "memory_key_padding_mask": hidden}
        x = torch.func.functional_call(made, values, (x, memory), how)
    logits = (final("decoder", x) @ ours["embed.tokens"].T).flatten(0, 1)
    record: dict[str, np.ndarray] = {}
    for smoothing in (0.0, SMOOTHING):
        loss = F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=smoothing)
        record[f"{smoothing}/loss"] = np.array(float(loss.detach()))
        found = torch.autograd.grad(loss, list(ours.values()), retain_graph=True)
        for name, gradient in zip(ours, found, strict=True):
            record[f"{smoothing}/gradient/{name}"] = gradient.numpy()
        print(f"smoothing {smoothing}: loss {float(loss.detach())}, PyTorch {torch.__version__}")
    np.savez_compressed(FILE, **record)
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
