"""nanopatch's runtime: files and cameras through exported nets, without torch. Importing does nothing."""
__version__ = "0.1.0"


def run(engine, source, limit=0, **options):
    """Yield (frame, result) for every frame of a source, without end for a camera:

        for frame, result in edge.run("model.onnx", "csi://0"):
            print(frame.index, result.area)

    engine: a model file with its contract beside it, or a shelf of edge-run --update; source: a path or URI, see
    edge.sources.open_source; limit: stop after so many frames; options: backend, threads, resize, still, score, pressure, least_rate and
    least_scale, as of edge-run, and the fields of edge.sources.uri.Options, such as width_px, policy or patience_s.
    result: a loop.Result; frame: a sources.Frame, whose pixels are frame.open().window(0, 0, height, width), of a video valid
    until the next frame.
    Raises what the command would report, a subclass of errors.EdgeError. Leaving the loop ends the camera's process."""
    from edge import loop  # numpy is loaded now, not by `import edge`
    return loop.frames(engine, source, limit, **options)
