"""transformers' continuous batching: what a request may ask for, so that one that is too long fails alone."""

from typing import Any

from pldr.masks import too_long


def limit_requests(manager: Any, context: int) -> Any:
    """A `ContinuousBatchingManager` in which no request goes beyond the context.

    A prompt that leaves no room in it is refused where it is added alone, as servers do; of several, it fails, and is handed out
    like any other failed request. Another one's new tokens end where the context does. Without this, its row of tokens would
    fail in the model, and every request in it.
    """
    from transformers.generation.continuous_batching import RequestState  # heavy, and there when a manager is

    if "add_request" in vars(manager):  # a manager that was kept
        return manager
    add, add_all = manager.add_request, manager.add_requests

    def add_request(
        input_ids: list[int], request_id: str | None = None, max_new_tokens: int | None = None, **settings: Any
    ) -> str | None:
        room = context - len(input_ids)
        if room < 1:
            raise refusal(input_ids)
        asked = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        return add(
            input_ids, request_id=request_id, max_new_tokens=room if asked is None else min(asked, room), **settings
        )

    def add_requests(inputs: list[list[int]], *args: Any, **settings: Any) -> list[str]:
        added = iter(add_all([input_ids for input_ids in inputs if len(input_ids) < context], *args, **settings))
        return [next(added) if len(input_ids) < context else fail(input_ids) for input_ids in inputs]

    def fail(input_ids: list[int]) -> str:
        with manager._request_lock:
            request_id = f"req_{manager._request_counter}"
            manager._request_counter += 1
        state = RequestState(request_id=request_id, initial_tokens=list(input_ids), max_new_tokens=0)
        manager.output_router.fail_and_deliver(state, refusal(input_ids))
        return request_id

    def refusal(input_ids: list[int]) -> Exception:
        return too_long(
            f"prompt of {len(input_ids)} tokens leaves no room in the context length max_position_embeddings={context}"
        )

    manager.add_request, manager.add_requests = add_request, add_requests
    return manager
