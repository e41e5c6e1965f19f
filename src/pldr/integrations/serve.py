"""`transformers serve`: what is longer than the context is the client's mistake, and answered with 400 in place of 500."""

from typing import Any

from pldr.masks import TooLong


def register(module: Any) -> None:
    """Give the applications that `transformers.cli.serving.server` builds from now on a handler for `TooLong`."""
    build = module.build_server

    def build_server(*args: Any, **kwargs: Any) -> Any:
        application = build(*args, **kwargs)
        application.add_exception_handler(TooLong, _refuse)
        return application

    module.build_server = build_server


async def _refuse(request: Any, error: TooLong) -> Any:
    from fastapi.responses import JSONResponse

    return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, status_code=400)
