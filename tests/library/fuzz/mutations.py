"""Changes that turn something valid into what a hostile or unlucky user has."""

import copy
import json

import torch

NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**31,
    2**53,
    2**63,
    2**64,
    -(2**63),
    10**30,
    10**400,
    0.5,
    -1.5,
    1e-320,
    1e30,
    1e308,
)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
TEXTS = ("", "a", "0", "-1", "nan", "\0", "\ud800", "é" * 3, "x" * 3000, "x\ny", "../..", "1" * 5000)
OTHERS = (None, True, False, [], {}, [[]], [1, 2], {"a": 1}, {"of": "x"}, {"float": "nan"})
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


def strange_value(random):
    """A JSON value that is seldom what is wanted."""
    return random.choice([*NUMBERS, *NOT_FINITE, *TEXTS, *OTHERS, nested(random.choice((3, 300)))])


def nested(depth):
    result = []
    for _ in range(depth):
        result = [result]
    return result


def changed_json(random, value):
    """A copy of a tree of JSON values with one to three changes."""
    tree = {"root": copy.deepcopy(value)}
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = [place for place in _places(tree) if place[0] is not tree or random.random() < 0.05]
        if not places:
            break
        holder, key = random.choice(places)
        change = random.choice(("replace", "replace", "nudge", "delete", "add", "move", "repeat"))
        if change == "replace":
            holder[key] = strange_value(random)
        elif change == "nudge":
            holder[key] = _nudged(random, holder[key])
        elif change == "delete" and holder is not tree:
            del holder[key]
        elif change == "add" and isinstance(holder, dict):
            holder[random.choice((*TEXTS, str(key) + "_"))] = strange_value(random)
        elif change == "move":
            other, its_key = random.choice(places)
            holder[key] = copy.deepcopy(other[its_key])
        elif isinstance(holder, list):
            holder.append(copy.deepcopy(holder[key]))
    return tree["root"]


def _places(tree):
    """All (container, key) of a tree."""
    places, waiting = [], [tree]
    while waiting:
        holder = waiting.pop()
        keys = holder if isinstance(holder, dict) else range(len(holder))
        for key in list(keys):
            places.append((holder, key))
            if isinstance(holder[key], dict | list):
                waiting.append(holder[key])
    return places


def _nudged(random, value):
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return random.choice((value + 1, value - 1, -value, value * 2, float(value), str(value)))
    if isinstance(value, str):
        return random.choice((value[1:], value + "x", value.upper(), value * 2))
    return value


def changed_text(random, value):
    """JSON text of a value, with a fault that only text can have."""
    text = json.dumps(value)
    fault = random.choice(("cut", "twice", "digits", "deep", "coma"))
    if fault == "cut":
        return text[: random.randrange(len(text))]
    if fault == "twice" and isinstance(value, dict) and value:
        key = random.choice(list(value))
        return f"{text[:-1]}, {json.dumps(key)}: {json.dumps(strange_value_for_text(random))}}}"
    if fault == "digits":
        return text.replace("1", "1" * 5000, 1)
    if fault == "deep":
        return "[" * 50_000
    return text.replace(",", random.choice((";", ",,", "")), 1)


def strange_value_for_text(random):
    return random.choice((0, 1, "a", None, 1e30))


def changed_bytes(random, content):
    """Bytes with a few of them flipped, lost, doubled or overwritten."""
    content = bytearray(content)
    if not content:
        return bytes(random.randrange(256) for _ in range(8))
    place = random.randrange(len(content))
    # What says how the rest is to be read comes first.
    if random.random() < 0.5:
        place = random.randrange(min(len(content), 64))
    change = random.choice(("flip", "flip", "cut", "lose", "double", "zero", "ones", "noise"))
    length = random.choice((1, 2, 8, 100))
    if change == "flip":
        for _ in range(random.choice((1, 1, 3, 30))):
            content[random.randrange(len(content)) if random.random() < 0.5 else place] ^= (
                1 << random.randrange(8)
            )
    elif change == "cut":
        del content[place:]
    elif change == "lose":
        del content[place : place + length]
    elif change == "double":
        content[place:place] = content[place : place + length]
    else:
        filler = {"zero": bytes(length), "ones": b"\xff" * length}.get(change) or random.randbytes(length)
        content[place : place + length] = filler
    return bytes(content)


def change_tensors(random, tensors):
    """Change one tensor of a mapping, in place."""
    name = random.choice(sorted(tensors))
    tensor = tensors[name]
    change = random.choice(("drop", "rename", "swap", "shape", "shape", "dtype", "values", "values", "add"))
    if change == "drop":
        del tensors[name]
    elif change == "rename":
        tensors[random.choice((name + "x", name.partition(".")[2] or "x", name + ".0", "x"))] = tensors.pop(
            name
        )
    elif change == "swap":
        tensors[name] = tensors[random.choice(sorted(tensors))].clone()
    elif change == "shape":
        flat = tensor.reshape(-1)
        tensors[name] = random.choice(
            (
                flat[:1],
                flat[:0],
                flat,
                tensor[None],
                torch.cat([flat, flat]),
                flat[: len(flat) // 2],
                flat.sum(),
            )
        ).clone()
    elif change == "dtype":
        tensors[name] = tensor.to(random.choice(DTYPES))
    elif change == "values":
        tensors[name] = torch.full_like(tensor, random.choice((0, 1, 3, 255)))
        if tensor.is_floating_point():
            tensors[name].fill_(random.choice((0.0, -1.0, 1e38, -1e38, *NOT_FINITE)))
    else:
        tensors[random.choice(("x", "model.x", "optimizer.0.x", "optimizer.x", "random.x", name + ".x"))] = (
            tensor.reshape(-1)[:0]
        )
