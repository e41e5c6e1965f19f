"""`transformers serve`: what is longer than the context is the client's mistake, which the answer says in OpenAI's form.

Without this, as with a model's own code, the answer has the status 400 as well (`pldr.masks`), but OpenAI's client does not show why.
"""

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
