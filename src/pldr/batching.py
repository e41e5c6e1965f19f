"""transformers' continuous batching: what a request may ask for, so that one that is too long fails alone."""

from typing import Any


def limit_requests(manager: Any, context: int) -> Any:
    """A `ContinuousBatchingManager` in which no request goes beyond the context.

    A prompt that leaves no room in it fails, and is handed out like any other failed request; another one's new tokens end
    where the context does. Without this, its row of tokens would fail in the model, and every request in it.
    """
    from transformers.generation.continuous_batching import RequestState  # heavy, and there when a manager is

    if "add_request" in vars(manager):  # a manager that was kept
        return manager
    add = manager.add_request

    def add_request(
        input_ids: list[int], request_id: str | None = None, max_new_tokens: int | None = None, **settings: Any
    ) -> str | None:
        room = context - len(input_ids)
        asked = manager.generation_config.max_new_tokens if max_new_tokens is None else max_new_tokens
        if room >= 1:
            new = room if asked is None else min(asked, room)
            return add(input_ids, request_id=request_id, max_new_tokens=new, **settings)
        if request_id is None:
            with manager._request_lock:
                request_id = f"req_{manager._request_counter}"
                manager._request_counter += 1
        message = (
            f"prompt of {len(input_ids)} tokens leaves no room in the context length max_position_embeddings={context}"
        )
        state = RequestState(request_id=request_id, initial_tokens=list(input_ids), max_new_tokens=0)
        manager.output_router.fail_and_deliver(state, ValueError(message))
        return request_id

    manager.add_request = add_request
    return manager
