"""Measures the speed of decoding videos and of resizing pictures, beside other libraries.

Video: one frame a second of an H.264 file with 30 frames a second, as RGB, compared with decord2,
OpenCV and torchcodec, where these are installed. Pictures: resizing and tiling, compared with
transformers' MllamaImageProcessor (its PIL form), with and without normalizing. Contestants take
turns; CPU seconds are those of all threads of this process.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from data_pipeline.commands import CommandParser
from data_pipeline.images import IMAGE_MEAN, IMAGE_STD, tile_image
from data_pipeline.video import frames_at
from moss_train.model.normalize import normalize
from moss_train.model_config import VisionConfig

RATE = 30  # frames a second of the file
Contestant = Callable[[], int]  # returns the number of frames it has made


def write_video(path: Path, seconds: int, height: int) -> None:
    """A textured picture that sways, and a square that crosses it; x264's own key frames."""
    width = height * 16 // 9
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (height // 8 + 20, width // 8 + 60, 3), dtype=np.uint8)
    size = (8 * coarse.shape[1], 8 * coarse.shape[0])
    scene = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        for i in range(seconds * RATE):
            top, left = int(60 + 50 * np.sin(i / 40)), int(240 + 200 * np.sin(i / 70))
            picture = scene[top : top + height, left : left + width].copy()
            at = 7 * i % (width - 200)
            picture[300:500, at : at + 200] = 255 - picture[300:500, at : at + 200]
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        file.mux(stream.encode())


def decoders(path: Path, seconds: int, threads: int) -> dict[str, Contestant]:
    """The decoders to compare, ours first. Each decodes the frames of all seconds into memory,
    opening the file included."""
    data, times = path.read_bytes(), [float(i) for i in range(seconds)]
    frames = [i * RATE for i in range(seconds)]

    def ours() -> int:
        return sum(1 for _ in frames_at(data, times, threads))

    contestants: dict[str, Contestant] = {"ours": ours}
    try:
        import decord

        def with_decord() -> int:
            reader = decord.VideoReader(str(path), num_threads=threads)
            return len(reader.get_batch(frames).asnumpy())

        contestants["decord2"] = with_decord
    except (ImportError, OSError) as error:
        print(f"decord2 is left out: {str(error).splitlines()[0]}")
    try:
        import cv2

        def with_opencv() -> int:
            options = [cv2.CAP_PROP_N_THREADS, threads]
            video, count = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, options), 0
            for i in range(frames[-1] + 1):
                video.grab()
                if i % RATE == 0:
                    count += cv2.cvtColor(video.retrieve()[1], cv2.COLOR_BGR2RGB).shape[2] == 3
            return count

        contestants["OpenCV"] = with_opencv
    except (ImportError, OSError) as error:
        print(f"OpenCV is left out: {str(error).splitlines()[0]}")
    try:
        from torchcodec.decoders import VideoDecoder

        def with_torchcodec() -> int:
            decoder = VideoDecoder(str(path), num_ffmpeg_threads=threads)
            return len(decoder.get_frames_at(frames).data)

        contestants["torchcodec"] = with_torchcodec
    except (ImportError, OSError, RuntimeError) as error:
        print(f"torchcodec is left out: {str(error).strip().splitlines()[0]}")
    return contestants


def compare(contestants: dict[str, Contestant], rounds: int) -> None:
    """Prints each one's frames a second, and its CPU time over that of the first."""
    rate: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    order = list(contestants.items())
    for _, work in order:  # what only a first call does
        work()
    for number in range(rounds):
        for name, work in order if number % 2 == 0 else order[::-1]:
            began, began_cpu = time.perf_counter(), time.process_time()
            frames = work()
            rate[name].append(frames / (time.perf_counter() - began))
            cpu[name].append((time.process_time() - began_cpu) / frames)
    first = next(iter(contestants))
    for name in contestants:
        slower = [mine / base for mine, base in zip(cpu[name], cpu[first], strict=True)]
        print(
            f"  {name:30} {statistics.median(rate[name]):8.1f} /s  "
            f"{1e3 * statistics.median(cpu[name]):8.2f} ms CPU each  "
            f"{statistics.median(slower):5.2f}x ({min(slower):.2f}-{max(slower):.2f})"
        )


def transforms(picture: np.ndarray, max_tiles: int, repeat: int = 8) -> dict[str, Contestant]:
    """The transforms to compare, ours and transformers', into bytes and normalized, at the tile
    size of Llama-3.2-Vision."""
    vision = VisionConfig(max_tiles=max_tiles)
    image, pixels = Image.fromarray(picture), torch.from_numpy(picture).permute(2, 0, 1)
    size = {"height": vision.image_size, "width": vision.image_size}
    processor = MllamaImageProcessorPil(
        size=size, max_image_tiles=max_tiles, image_mean=IMAGE_MEAN, image_std=IMAGE_STD
    )

    def ours() -> object:
        return tile_image(pixels, vision.image_size, max_tiles)

    def ours_normalized() -> object:
        tiles, ratio = tile_image(pixels, vision.image_size, max_tiles)
        return normalize(tiles[None], torch.tensor([ratio]), vision, torch.float32)

    def theirs(**options: bool) -> object:
        return processor.preprocess(image, return_tensors="pt", **options)

    def repeated(work: Callable[[], object]) -> Contestant:
        return lambda: sum(work() is not None for _ in range(repeat))

    return {
        "ours": repeated(ours),
        "transformers": repeated(lambda: theirs(do_rescale=False, do_normalize=False)),
        "ours, normalized": repeated(ours_normalized),
        "transformers, normalized": repeated(theirs),
    }


def main() -> None:
    parser = CommandParser("python -m tools.bench.video", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="length of the video")
    parser.add_argument("--height", type=int, default=1080, help="pixels of the video")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant")
    parser.add_argument("--threads", type=int, default=1, help="threads of each decoder")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.mp4"
        print(f"writing {options.seconds} s of {options.height}p ...", flush=True)
        write_video(path, options.seconds, options.height)
        print(f"video, {path.stat().st_size / 1e6:.1f} MB, {options.threads} threads:")
        compare(decoders(path, options.seconds, options.threads), options.rounds)
    random = np.random.default_rng(0)
    for height, width in ((480, 640), (1080, 1920), (3000, 4000)):
        picture = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for max_tiles in (1, 4):
            print(f"picture of {width} x {height}, {max_tiles} tiles at most:")
            compare(transforms(picture, max_tiles), options.rounds)


if __name__ == "__main__":
    main()
