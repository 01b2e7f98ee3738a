"""Makes the model's inputs from text with marks, images and videos: `AutoProcessor`.

A copy of this file is in every exported folder. `<|image|>` in a text stands for an image,
`<|video|>` for a video, which becomes one `<|image|>` for each of its frames. Tiles are cut and
normalized by transformers' Mllama image processor (`max_image_tiles: 1` for MOSS-Video).
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.request import url2pathname

from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin, __version__

from .clock_moss_video import (
    EPSILON,
    Track,
    VideoError,
    frames_on_screen,
    open_container,
    read_track,
)
from .options_moss_video import padded_length, read_options, share, texts_of
from .pixels_moss_video import frame_pixels, to_rgb

IMAGE, VIDEO, HEADER_END = "<|image|>", "<|video|>", "<|end_header_id|>"
INLINE = {IMAGE, VIDEO, "<|silence|>", "<|...|>"}  # special tokens that a content may hold
_LONGEST_PATH = 4096
TYPED = "\ufdd0"  # no character: stands in what looks like a special token and is text


class MossVideoProcessor(ProcessorMixin):
    """Tokenizer, image processor, and how many frames of a video are shown.

    A video shows a frame every 1 / `video_fps` s from its first one; where these would be fewer
    than `video_min_frames` or more than `video_max_frames`, so many, spread evenly.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        video_fps: float = 1.0,
        video_min_frames: int = 8,
        video_max_frames: int = 256,
    ):
        self.video_fps = video_fps
        self.video_min_frames, self.video_max_frames = video_min_frames, video_max_frames
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """A text, or a batch of them, with their media.

        Args:
            images: of one text: a list; of a batch: a list for each text, or one list that the
                marks of all texts go through.
            videos: likewise; each a path, a file's bytes, a list of pictures (all are shown), or
                an array `[F, H, W, 3]`.
                A picture is a path or `file://` URL, a file's bytes, or these as base64 or `data:`
                URL, an open file, `{"bytes": ..., "path": ...}` (an undecoded row of datasets), a
                PIL image, or what `to_rgb` takes beside one; any is turned as its EXIF says, put on
                white where transparent, 16 bits brought to 8. Other URLs are not fetched.
            return_tensors: "pt", "np" or None (lists).
            padding: False, True or "longest", "max_length" (with `max_length`).
            pad_to_multiple_of: length in tokens that the padded one is a multiple of.
            padding_side: "left" (default: what generation wants) or "right".
            add_special_tokens: put `<|begin_of_text|>` before a text without one (default: True).
            video_fps, video_min_frames, video_max_frames: in place of the processor's own.

        Returns:
            `input_ids`, `attention_mask` `[B, S]`; with media `pixel_values` `[B, F, T, 3, h, w]`,
            `aspect_ratio_ids` `[B, F]`, `aspect_ratio_mask` `[B, F, T]`.

        Raises:
            ValueError: marks and media do not agree, a video cannot be read, an option is unknown
                or not done.
        """
        if audio is not None:
            raise ValueError("audio: the model takes images and videos")
        options, texts = read_options(kwargs), texts_of(text)
        self._check_marks(texts)
        pictures = share(images, [t.count(IMAGE) for t in texts], "images")
        clips = share(videos, [t.count(VIDEO) for t in texts], "videos")
        tokens, frames = [], []
        for one, images_of_text, clip in zip(texts, pictures, clips, strict=True):
            expanded, media = self._expand(one, iter(images_of_text), iter(clip), options)
            tokens.append(self._encode(expanded, options.get("add_special_tokens") is not False))
            frames.append(media)
        data = self._pad(tokens, options)
        tensors = options.get("return_tensors")
        if any(frames):
            data |= self._pixels(frames)
            if tensors is None:
                data = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in data.items()}
        return BatchFeature(data=data, tensor_type=tensors)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' own. A special token that a content spells stays text, as in training: it
        ends no turn and forges no other's. In a content that is a string, `<|image|>`, `<|video|>`,
        `<|silence|>` and `<|...|>` are what they are; in a list of parts media are parts, and all
        of a text is text, but of a system prompt, where the last two are what they are in training.
        A content of None is an empty one. All of a tool, a call of one and its arguments is text.

        A text that is returned has U+FDD0 in such places, which this processor's call takes out.

        Raises:
            ValueError: there is no message, a part says no type, the mask of answers is wanted.
        """
        if kwargs.get("return_assistant_tokens_mask"):
            raise ValueError("return_assistant_tokens_mask: not done: labels are those of training")
        one = conversation and isinstance(conversation[0], dict)
        chats = [conversation] if one else conversation
        if not chats or not all(chats):
            raise ValueError("conversation: has no messages")
        # transformers 4 looks for media in a content that is a string, too, and fails.
        parts = __version__.startswith("4.") and kwargs.get("tokenize", False)
        typed = [[_typed(turn, parts) for turn in turns] for turns in chats]
        if parts and "video_fps" in kwargs:  # which it would call fps
            rate = {"video_fps": kwargs.pop("video_fps")}
            kwargs["videos_kwargs"] = {**kwargs.get("videos_kwargs", {}), **rate}
        if kwargs.get("tools"):
            kwargs["tools"] = _as_text(kwargs["tools"])
        return super().apply_chat_template(typed[0] if one else typed, *args, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return [
            "input_ids",
            "attention_mask",
            "pixel_values",
            "aspect_ratio_ids",
            "aspect_ratio_mask",
        ]

    def batch_decode(self, *args: Any, **kwargs: Any) -> list[str]:
        """The tokenizer's `batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """The tokenizer's `decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def _expand(
        self, text: str, images: Iterator[Any], videos: Iterator[Any], options: dict[str, Any]
    ) -> tuple[str, list[Any]]:
        """The text with an `<|image|>` for each frame of its media, and these frames in order."""
        pieces, frames = [], []
        for piece in re.split(r"(<\|image\|>|<\|video\|>)", text):
            if piece == IMAGE:
                frames.append(next(images))
            elif piece == VIDEO:
                video_frames = self._video(next(videos), options)
                frames += video_frames
                piece = IMAGE * len(video_frames)
            pieces.append(piece)
        return "".join(pieces), frames

    def _video(self, video: Any, options: dict[str, Any]) -> list[Any]:
        if not isinstance(video, str | Path | bytes):
            return [video] if isinstance(video, Image.Image) else list(video)
        names = ("video_fps", "video_min_frames", "video_max_frames")
        return read_video(video, *(options.get(name, getattr(self, name)) for name in names))

    def _check_marks(self, texts: list[str]) -> None:
        """Raises ValueError for a mark that the tokenizer would take for letters."""
        for mark in INLINE:
            needed = IMAGE if mark == VIDEO else mark  # it becomes one for each frame
            token = self.tokenizer.convert_tokens_to_ids(needed)
            unknown = token is None or token == self.tokenizer.unk_token_id
            if unknown and any(mark in text for text in texts):
                raise ValueError(
                    f"text: has {mark}, but the tokenizer has no token {needed}: use one of "
                    "Llama-3.2-Vision with the tokens of MOSS-Video"
                )

    def _encode(self, text: str, add_bos: bool) -> list[int]:
        """The tokens of a text, as in training: a header's line ends never merge with what
        follows."""
        bos = self.tokenizer.bos_token
        if add_bos and bos and bos not in text:
            text = bos + text
        tokens: list[int] = []
        for piece in re.split(r"(?<=<\|end_header_id\|>)(\n\n)", text):
            if TYPED in piece:
                tokens += self._encode_typed(piece)
            elif piece:
                tokens += self.tokenizer.encode(piece, add_special_tokens=False)
        return tokens

    def _encode_typed(self, text: str) -> list[int]:
        """The tokens of a text in which typed special tokens are text."""
        added = self.tokenizer.added_tokens_decoder
        special = {str(token): number for number, token in added.items() if token.special}
        tokens: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, special))})", text):
            if piece in special:
                tokens.append(special[piece])
            elif piece:
                letters = piece.replace(TYPED, "")
                tokens += self.tokenizer.encode(
                    letters, add_special_tokens=False, split_special_tokens=True
                )
        return tokens

    def _pad(self, tokens: list[list[int]], options: dict[str, Any]) -> dict[str, Any]:
        length = padded_length([len(row) for row in tokens], options)
        pad = self.tokenizer.pad_token_id
        if pad is None:
            pad = 0  # masked, so of no meaning
        left = options.get("padding_side") != "right"
        ids, masks = [], []
        for row in tokens:
            extra, ones = max(0, length - len(row)), [1] * len(row)
            ids.append([pad] * extra + row if left else row + [pad] * extra)
            masks.append([0] * extra + ones if left else ones + [0] * extra)
        return {"input_ids": ids, "attention_mask": masks}

    def _pixels(self, frames: list[list[Any]]) -> dict[str, Tensor]:
        """The frames of all rows in one tensor; rows with fewer frames end in zeros (one empty
        tile, ratio id 0)."""
        flat = [_picture(frame) for row in frames for frame in row]
        made = self.image_processor([flat], return_tensors="pt")
        counts, most = [len(row) for row in frames], max(map(len, frames))
        out = {}
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            rows = made[name][0].split(counts)
            out[name] = made[name].new_zeros(len(rows), most, *made[name].shape[2:])
            for n, row in enumerate(rows):
                out[name][n, : len(row)] = row
        for n, count in enumerate(counts):
            out["aspect_ratio_mask"][n, count:, 0] = 1  # as transformers has it
        return out


def _typed(turn: dict[str, Any], parts: bool) -> dict[str, Any]:
    """A turn with TYPED in every special token that must stay text, its content in parts if so."""
    calls = [_as_text(_in_one_form(call)) for call in turn.get("tool_calls") or []]
    content = _typed_content(turn)
    if parts and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    return {**turn, **({"tool_calls": calls} if calls else {}), "content": content}


def _in_one_form(call: Any) -> Any:
    """A call whose arguments, if they are a text, are JSON as training writes it: of a text that is
    no JSON, a text of JSON."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    arguments = function["arguments"]
    with contextlib.suppress(ValueError, RecursionError):
        arguments = json.loads(arguments)
    function = {**function, "arguments": json.dumps(arguments, ensure_ascii=False)}
    return {**call, "function": function} if call.get("function") else function


def _as_text(value: Any) -> Any:
    """What becomes JSON, with TYPED in all that looks like a special token."""
    if isinstance(value, str):
        return _with_meanings(value, set())
    if isinstance(value, list | tuple):
        return [_as_text(one) for one in value]
    if isinstance(value, dict):
        return {_as_text(name): _as_text(one) for name, one in value.items()}
    return value


def _typed_content(turn: dict[str, Any]) -> Any:
    content = turn.get("content") or []
    if isinstance(content, str):
        return _with_meanings(content, INLINE)
    for part in content:
        if not isinstance(part, dict) or "type" not in part:
            raise ValueError(f"content: {part!r:.80}: it needs a type: text, image or video")
    kept = INLINE - {IMAGE, VIDEO} if turn.get("role") in ("system", "developer") else set()
    return [
        {**part, "text": _with_meanings(part["text"], kept)} if part.get("text") else part
        for part in content
    ]


def _with_meanings(text: str, kept: set[str]) -> str:
    excluded = "".join(f"(?!{re.escape(mark[1:])})" for mark in kept)
    return re.sub(rf"<{excluded}(?=\|)", f"<{TYPED}", text)


def read_video(
    source: str | Path | bytes, fps: float, min_frames: int, max_frames: int
) -> list[Image.Image]:
    """The frames on screen at the moments that `MossVideoProcessor` describes, upright.

    Args:
        source: a path, or the bytes of a file.

    Raises:
        ValueError: the file cannot be read as a video.
    """
    import av

    try:
        data = source if isinstance(source, bytes) else Path(_no_url(source)).read_bytes()
        with open_container(data) as file:
            track = read_track(file, data)
            moments = _moments(track, fps, min_frames, max_frames)
            codec = track.stream.codec_context
            decoded = (frame for packet in [*track.packets, None] for frame in codec.decode(packet))
            on_screen = frames_on_screen(decoded, track, moments)
            upright: dict[int, Any] = {}  # a frame that stays is turned once
            frames: list[Image.Image] = []
            for f in on_screen:
                if id(f) not in upright:
                    upright[id(f)] = f, Image.fromarray(frame_pixels(f, track.stream))
                frames.append(upright[id(f)][1])
            return frames
    except (OSError, ValueError, VideoError, av.FFmpegError) as error:
        raise ValueError(f"{source!s:.200}: cannot be read as a video: {error!s:.200}") from None


def _moments(track: Track, fps: float, least: int, most: int) -> list[float]:
    """Seconds, on the file's clock, at which frames of a video are shown."""
    first, last = track.times[0], track.times[-1]
    natural = max(1, int((track.end - first) * fps + EPSILON))
    count = min(max(natural, least), most)
    if count == natural:
        return [first + i / fps for i in range(count)]
    return [first + (last - first) * i / max(count - 1, 1) for i in range(count)]


def _picture(image: Any) -> Image.Image:
    """The RGB pixels of a PIL image, an array, a tensor, or a file: its path, its bytes, or these
    as base64. Raises ValueError."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or image
    if hasattr(image, "read"):
        image = image.read()
    file = isinstance(image, str | Path | bytes)
    if not file and not isinstance(image, Image.Image) and not hasattr(image, "__array__"):
        raise ValueError(f"images: a {type(image).__name__} is no picture: give a path, a file's "
                         "bytes, a PIL image, an array or a tensor")  # fmt: skip
    try:
        return to_rgb(Image.open(_file(image)) if file else image)
    except UnidentifiedImageError:
        raise ValueError(f"images: {image!r:.80}: is no picture, of a file or in base64") from None
    except (OSError, SyntaxError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"images: {image!r:.80}: cannot be read: {reason:.200}") from None


def _file(image: str | Path | bytes) -> Path | io.BytesIO:
    """What Pillow opens of a path, of bytes, or of text that stands for bytes."""
    if isinstance(image, bytes):
        return io.BytesIO(image)
    text = str(_no_url(image))
    inside = text.startswith("data:")
    # Path.exists raises for base64, as for all names that are too long for a file.
    if not inside and len(text) < _LONGEST_PATH and os.path.exists(text):
        return Path(text)
    try:
        data = text.partition(",")[2] if inside else text
        return io.BytesIO(base64.b64decode(data, validate=not inside))
    except (binascii.Error, ValueError):
        raise OSError("is no base64" if inside else "there is no such file") from None


def _no_url(name: str | Path) -> str | Path:
    if str(name).startswith(("http://", "https://")):
        raise ValueError(f"{name:.80}: URLs are not fetched: give a path or the file's bytes")
    local = str(name).startswith("file://")
    return url2pathname(str(name).removeprefix("file://")) if local else name


if __version__.startswith("4."):  # which asks the class for its parts; 5 asks the constructor
    MossVideoProcessor.attributes = ["image_processor", "tokenizer"]
    MossVideoProcessor.image_processor_class = "AutoImageProcessor"
    MossVideoProcessor.tokenizer_class = "AutoTokenizer"

MossVideoProcessor.register_for_auto_class()

__all__ = ["MossVideoProcessor"]
