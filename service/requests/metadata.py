"""Texts in image files: the parameters that made the image, and its provenance.

Parameters are the text chunk `parameters` of a PNG file, and the Exif UserComment of a JPEG or WebP file, as
AUTOMATIC1111's web UI writes them. Provenance is an XMP packet with IPTC's DigitalSourceType.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple
from xml.sax.saxutils import escape

from PIL import Image
from PIL.PngImagePlugin import PngInfo

PARAMETERS = "parameters"  # name of the text chunk in a PNG file
PNG_XMP = "XML:com.adobe.xmp"
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
UNICODE = b"UNICODE\0"  # head of a UserComment in UTF-16
MAX_JPEG_EXIF = 65_500  # bytes: one segment of a JPEG file

DigitalSource = Literal["trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"]
XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" xmlns:xmp="http://ns.adobe.com/xap/1.0/">
<Iptc4xmpExt:DigitalSourceType>{source}</Iptc4xmpExt:DigitalSourceType>
<xmp:CreatorTool>{tool}</xmp:CreatorTool>
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
TOOL = "Latent diffusion service"


class Metadata(NamedTuple):
    """What a file says about its image. parameters: '' for none; source: None for no statement."""

    parameters: str = ""
    source: DigitalSource | None = None


NONE = Metadata()


def save_options(kind: str, metadata: Metadata) -> dict[str, Any]:
    """Options of Pillow's save() that write the metadata into a png, jpeg or webp file.

    Parameters that are too long for a JPEG file are left out.
    """
    options: dict[str, Any] = {}
    if kind == "png":
        if metadata != NONE:
            options["pnginfo"] = PngInfo()
        if metadata.parameters:
            options["pnginfo"].add_text(PARAMETERS, metadata.parameters)
        if metadata.source:
            options["pnginfo"].add_itxt(PNG_XMP, xmp(metadata.source))
        return options
    exif = user_comment(metadata.parameters) if metadata.parameters else b""
    if exif and (kind != "jpeg" or len(exif) <= MAX_JPEG_EXIF):
        options["exif"] = exif
    if metadata.source:
        options["xmp"] = xmp(metadata.source).encode()
    return options


def xmp(source: DigitalSource) -> str:
    """The XMP packet that states where an image comes from (IPTC Photo Metadata Standard)."""
    return XMP.format(source=escape(SOURCES + source), tool=escape(TOOL))


def user_comment(text: str) -> bytes:
    """Exif data with a text as UserComment."""
    exif = Image.Exif()
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text.encode("utf-16-be", "replace")
    return exif.tobytes()


def read_parameters(image: Image.Image) -> tuple[str, dict[str, str]]:
    """(parameters, other texts) of an opened file; the parameters are empty if the file has none."""
    items = {str(name): value for name, value in image.info.items() if isinstance(value, str)}
    comment = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    text = items.pop(PARAMETERS, None)
    return text or (decoded(comment) if isinstance(comment, bytes) else ""), items


def decoded(comment: bytes) -> str:
    """The text of an Exif UserComment."""
    kind, text = comment[:8], comment[8:]
    return text.decode("utf-16-be" if kind == UNICODE else "utf-8", "replace").strip("\0")
