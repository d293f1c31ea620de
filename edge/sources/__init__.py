"""Where frames come from. A source is a URI or path; it yields Frames, stops at its end and has close()."""
import itertools
from typing import Any, Callable, Dict, NamedTuple, Optional

from edge.sources import uri as uris


class Frame(NamedTuple):
    index: int                               # counts what the source gave; a gap is a frame that was dropped
    name: str                                # of the outputs: unique within a run, no suffix
    origin: str                              # path or URI, without its password
    open: Callable                           # () -> a picture, see edge.images; each call reads from the start
    capture_time_s: Optional[float] = None   # seconds since 1970 at its arrival; None: when it is opened
    arrived_s: Optional[float] = None        # the same moment on time.monotonic()
    health: Optional[Dict[str, Any]] = None  # of a video source, see video.Video.health; None: a still image
    rate: Optional[float] = None             # frames per second of a video as its source says; None: it does not


def open_source(uri, limit=0, options=uris.Options()):
    """An iterator over the Frames of `uri`, at most `limit` when not 0. Call close() when done with it.

    uri: an image file, a folder, a glob, a numbered sequence (img_%04d.png), synthetic://WxH, a video file, file://PATH,
    csi://N, /dev/videoN, v4l2:///dev/videoN, rtsp://HOST/PATH or gst://PIPELINE. The pixels of a video's Frame are valid
    until the next one is asked for.
    Raises at once UsageError for a wrong URI or option, MissingPart without GStreamer and BadFile for a file or folder that
    is missing or empty; later BadFile for a damaged video and SourceLost for a camera that stays away."""
    place = uris.parse(uri)
    if place.kind in uris.VIDEO:
        from edge.sources import video  # cameras and their processes cost nothing where there are none
        return video.open_video(place, options, limit)
    from edge.sources import stills
    frames = stills.synthetic(*place.where) if place.kind == "synthetic" else stills.from_files(stills.find_files(place.where))
    return (frame for frame in itertools.islice(frames, limit or None))
