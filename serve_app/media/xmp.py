"""What a file says about itself in XMP, which picture viewers, editors and search engines read: that it was made by AI.

The word is IPTC's: `Iptc4xmpExt:DigitalSourceType` (IPTC Photo Metadata Standard 2025.1, "Digital Source Type").
Where XMP lies in each format: Adobe's XMP Specification Part 3, "Storage in Files" (PNG, JPEG, MPEG-4).
"""

import zlib
from collections.abc import Callable
from pathlib import Path

MADE_BY_AI = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
"""IPTC's term for media made by a trained model."""

PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    f'Iptc4xmpExt:DigitalSourceType="{MADE_BY_AI}"/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
).encode()

_PNG_HEADER_BYTES = 8 + 25
"""The signature and IHDR, which must be the first chunk."""
_MP4_XMP_UUID = bytes.fromhex("BE7ACFCB97A942E89C71999491E3AFAC")


def add_xmp(path: Path, content_type: str) -> None:
    """Let the file at `path` say in XMP that it was made by AI. Other types than PNG, JPEG and MP4 stay as they are.

    Writes in place. Raises OSError.
    """
    if content_type == "video/mp4":
        box = b"uuid" + _MP4_XMP_UUID + PACKET
        with path.open("ab") as file:  # at the end: no offset in the file changes, and the index stays before the data
            file.write((4 + len(box)).to_bytes(4) + box)
    elif with_xmp := _PICTURES.get(content_type):
        path.write_bytes(with_xmp(path.read_bytes()))


def _png(content: bytes) -> bytes:
    """PNG: an uncompressed iTXt chunk with the keyword of XMP, without language and translation."""
    chunk = b"iTXtXML:com.adobe.xmp\0\0\0\0\0" + PACKET
    whole = (len(chunk) - 4).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
    return content[:_PNG_HEADER_BYTES] + whole + content[_PNG_HEADER_BYTES:]


def _jpeg(content: bytes) -> bytes:
    """JPEG: an APP1 segment, after the APP0 that JFIF wants first."""
    segment = b"http://ns.adobe.com/xap/1.0/\0" + PACKET
    start = 2
    if content[2:4] == b"\xff\xe0":
        start += 2 + int.from_bytes(content[4:6])
    return content[:start] + b"\xff\xe1" + (2 + len(segment)).to_bytes(2) + segment + content[start:]


_PICTURES: dict[str, Callable[[bytes], bytes]] = {"image/png": _png, "image/jpeg": _jpeg}
