"""Bytes that were damaged on their way."""


def damaged(data: bytes, place: int, value: int, kind: int) -> bytes:
    """Returns bytes that are cut off at a place (kind 0), have one more (1), or another one at that place (2)."""
    changed = bytearray(data)
    if kind == 0:
        del changed[place % len(changed) :]
    elif kind == 1:
        changed += bytes([value])
    else:
        changed[place % len(changed)] ^= value
    return bytes(changed)
