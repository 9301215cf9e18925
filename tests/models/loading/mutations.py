"""Malformed models, reproducible from a seed: bytes, header fields and JSON values of small sound ones."""

import json
import random
import shutil
import struct
from pathlib import Path

NASTY_INTS = [-1, 0, 1, 2, 3, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1]
NASTY_VALUES = [
    *NASTY_INTS,
    10**12,
    10**400,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    None,
    True,
    False,
    "",
    "x",
    "../../etc/passwd",
    "/etc/passwd",
    "\x00",
    "\ud800",
    "é" * 1000,
    "{% for i in range(10) %}",
    "{{ ''.__class__.__mro__ }}",
    [],
    [[]],
    [1, "a", None],
    {},
    {"a": {"b": []}},
]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, remove, repeat or swap; most often near the front, where headers are."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if not out:
            break
        at = rng.randrange(min(len(out), rng.choice([16, 64, 1024, 4096, len(out)])))
        length = rng.choice([1, 2, 4, 8, 64])
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                del out[at:]
            case 2:
                out[at:at] = rng.randbytes(length)
            case 3:
                del out[at : at + length]
            case 4:
                out[at : at + length] = out[at : at + length] * 2
            case 5:
                other = rng.randrange(len(out))
                first, second = sorted((at, other))
                a, b = bytes(out[first : first + length]), bytes(out[second : second + length])
                out[first : first + length], out[second : second + length] = b, a
            case 6:
                nasty = rng.choice(NASTY_INTS) % 2**64
                out[at : at + 8] = struct.pack("<Q", nasty)
    return bytes(out)


def gguf_numbers(data: bytes) -> list[tuple[int, int]]:
    """Offsets and sizes of all numbers of a sound GGUF header: counts, lengths, types, shapes, offsets."""
    found, at = [], 4

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def value(kind: int) -> None:
        nonlocal at
        if kind == 8:
            length = number(8)
            at += length
        elif kind == 9:
            inner, length = number(4), number(8)
            for _ in range(length):
                value(inner)
        else:
            number({0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}[kind])

    number(4)
    tensors, fields = number(8), number(8)
    for _ in range(fields):
        value(8)
        value(number(4))
    for _ in range(tensors):
        value(8)
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


def mutate_gguf(data: bytes, rng: random.Random) -> bytes:
    """Replace one to three numbers of the header, or mutate bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    out, numbers = bytearray(data), gguf_numbers(data)
    # A tenth of the numbers are not lengths of tokens: pick from them half of the time.
    structural = [*numbers[:60], *numbers[-120:]]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        at, size = rng.choice(structural if rng.random() < 0.7 else numbers)
        old = int.from_bytes(out[at : at + size], "little")
        new = rng.choice([*NASTY_INTS, old + 1, old - 1, old * 2, old + 32, rng.getrandbits(8 * size)])
        out[at : at + size] = (new % 2 ** (8 * size)).to_bytes(size, "little")
    return bytes(out)


def mutate_json(value, rng: random.Random):
    """Replace, remove, add or copy one value somewhere in a JSON tree."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        out = dict(value)
        match rng.randrange(6):
            case 0:
                del out[key]
            case 1:
                out[rng.choice(["__metadata__", "x", key + "x"])] = rng.choice(NASTY_VALUES)
            case 2:
                out[key] = value[rng.choice(sorted(value))]
            case _:
                out[key] = mutate_json(value[key], rng)
        return out
    if isinstance(value, list) and value and rng.random() < 0.7:
        out, at = list(value), rng.randrange(len(value))
        out[at] = mutate_json(value[at], rng)
        return out
    if isinstance(value, int) and rng.random() < 0.5:
        return rng.choice([value + 1, value - 1, value * 2, -value, float(min(value, 10**300))])
    return rng.choice(NASTY_VALUES)


def mutate_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the JSON header and keep its length honest, or mutate bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    for _ in range(rng.choice([1, 1, 2])):
        if isinstance(header, dict) and rng.random() < 0.3:
            entry = rng.choice([v for k, v in sorted(header.items()) if k != "__metadata__"] or [{}])
            if isinstance(entry, dict):
                entry["dtype"] = rng.choice(
                    ["F64", "F16", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "U8", "C64", ""]
                )
        else:
            header = mutate_json(header, rng)
    text = json.dumps(header)
    if isinstance(header, dict) and rng.random() < 0.1:  # a name twice
        text = text[:-1] + "," + text[1:]
    head = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(head)) + head + data[8 + size :]


def mutate_text(data: bytes, rng: random.Random) -> bytes:
    """Change a JSON file as a tree, as text, or altogether."""
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(data, rng)
    if kind < 0.2:
        return rng.choice([b"", b"null", b"[]", b"{}", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 100_000])
    value = json.loads(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        value = mutate_json(value, rng)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def make_case(base: Path, out: Path, seed: int) -> Path:
    """Write the malformed model of a seed to `out`, and return what to load.

    `base` holds `*.gguf` files and hub directories; two cases of five are GGUF, the others directories.
    """
    rng = random.Random(seed)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if seed % 5 < 2:
        source = rng.choice(sorted(base.glob("*.gguf")))
        (out / "case.gguf").write_bytes(mutate_gguf(source.read_bytes(), rng))
        return out / "case.gguf"
    source = rng.choice(sorted(path for path in base.iterdir() if path.is_dir()))
    model = Path(shutil.copytree(source, out / "model"))
    for victim in rng.sample(sorted(model.iterdir()), rng.choice([1, 1, 1, 2])):
        if victim.suffix == ".safetensors":
            victim.write_bytes(mutate_safetensors(victim.read_bytes(), rng))
        elif rng.random() < 0.05:
            victim.unlink()
            if rng.random() < 0.5:
                victim.symlink_to(rng.choice(["/dev/zero", victim.name, "/etc/passwd", ".", "nowhere"]))
        else:
            victim.write_bytes(mutate_text(victim.read_bytes(), rng))
    return model
