"""The wire format of protobuf, as far as big tensors need it: a message is a row of fields.

    field:  tag (number << 3 | form), then a varint, 4 or 8 bytes, or a length and that many bytes

https://protobuf.dev/programming-guides/encoding
"""

import mmap

Buffer = memoryview | mmap.mmap
VARINT, LENGTH = 0, 2
_FIXED = {1: 8, 5: 4}
LONGEST = 10
"""Bytes of a number of 64 bits."""


def field(data: Buffer, position: int) -> tuple[int, int, int]:
    """Return the number of the field at ``position``, where its content begins and ends.

    Raises:
        IndexError: The data ends inside of the field's head.
        ValueError: Here is no field, or a number in it does not end.
    """
    tag, body = _decoded(data, position)
    form = tag & 7
    if form == LENGTH:
        length, body = _decoded(data, body)
        return tag >> 3, body, body + length
    if form == VARINT:
        return tag >> 3, body, _decoded(data, body)[1]
    if form not in _FIXED:
        raise ValueError(f"byte {position} is no field of a protobuf message")
    return tag >> 3, body, body + _FIXED[form]


def _decoded(data: Buffer, position: int) -> tuple[int, int]:
    """A number of 7 bits a byte, least first, and the position behind it."""
    value = data[position]
    position += 1
    if value < 0x80:
        return value, position
    value &= 0x7F
    for shift in range(7, 7 * LONGEST, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"byte {position} is within a number of more than {LONGEST} bytes")


def varint(value: int) -> bytes:
    """Write a number, 7 bits a byte, least first."""
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def head(number: int, length: int) -> bytes:
    """Write what stands before the ``length`` bytes of a field."""
    return varint(number << 3 | LENGTH) + varint(length)
