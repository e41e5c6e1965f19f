"""Where a server listens."""

import socket


def bound(host: str, port: int) -> socket.socket:
    """A socket with an address, that does not listen yet: who comes before the model is loaded is refused, not kept.

    Raises:
        OSError: the address is taken, or is none of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise OSError(f"port: {host}:{port} can not be listened on ({error.strerror}); choose another") from None
    return listening
