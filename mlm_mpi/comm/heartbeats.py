"""Short messages by TCP between one process of each node, and how long each node has been silent.

Of two nodes the first one connects, and says a token that only this job knows; the other one answers with it. A
connection of a stranger is closed without a word. Then come messages, a length and that many bytes. A connection that
ends is no silence: the kernel of a node closes what a dead process has left, and of a death MPI tells. When a link is
cut or a machine stands still nothing comes, not even that.
"""

import errno
import hmac
import selectors
import socket
import struct
import time
from collections.abc import Collection, Sequence

_MAGIC = b"mlm-beat"
_HELLO = struct.Struct("!8s32sI")  # magic, token, number of the node
_LENGTH = struct.Struct("!I")
_MOST_BYTES = 1 << 20  # of a message
_STRANGERS = 64  # connections that have not said who they are
_STRANGER_S = 5.0
_AGAIN_S = 6.0  # more than a stranger's time: one attempt at a time
_ENDED = (errno.ECONNRESET, errno.EPIPE)  # the other side is there and has closed; any other error is silence
MOST_S = 0.5  # of my own time between two turns: I may have been suspended, or the whole machine

Address = tuple[str, int]


class Silence:
    """Counts how long each node has said nothing, in time in which this process ran."""

    def __init__(self) -> None:
        self._silent_s: dict[int, float] = {}

    def passed(self, since_s: float, heard: Collection[int], gone: Collection[int]) -> None:
        """`since_s` later: these have said something, and those have ended. Who has never spoken is not missed."""
        known = {node: silent_s + min(since_s, MOST_S) for node, silent_s in self._silent_s.items()}
        self._silent_s = {node: s for node, s in (known | dict.fromkeys(heard, 0.0)).items() if node not in gone}

    def longer_than(self, limit_s: float) -> dict[int, float]:
        """node -> for how long."""
        return {node: silent_s for node, silent_s in self._silent_s.items() if silent_s > limit_s}

    def heard_within(self, limit_s: float) -> list[int]:
        """Nodes that have spoken since."""
        return [node for node, silent_s in self._silent_s.items() if silent_s <= limit_s]

    def known(self) -> list[int]:
        """Nodes that have spoken at all, and have not ended."""
        return list(self._silent_s)


class _Line:
    """One connection."""

    def __init__(self, connection: socket.socket, first: bytes) -> None:
        """`first` is sent as soon as the kernel takes it."""
        self.socket, self.node = connection, -1  # of the other side, once it has said so
        self.began = time.monotonic()
        self._in, self._out = b"", first

    def fill(self) -> None:
        """Reads what is there. Raises OSError; EOFError where the other side has closed."""
        try:
            data = self.socket.recv(1 << 16)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            raise EOFError
        self._in += data

    def take(self, size: int) -> bytes | None:
        """The next bytes, when they have all come."""
        if len(self._in) < size:
            return None
        data, self._in = self._in[:size], self._in[size:]
        return data

    def message(self) -> bytes | None:
        """The next whole one. Raises ValueError where it is too long to be one of ours."""
        if len(self._in) < _LENGTH.size:
            return None
        (size,) = _LENGTH.unpack_from(self._in)
        if size > _MOST_BYTES:
            raise ValueError(size)
        found = self.take(_LENGTH.size + size)
        return None if found is None else found[_LENGTH.size :]

    def send(self, message: bytes) -> None:
        """Who does not read misses messages, never a part of one. Raises OSError."""
        self.push(b"" if self._out else _LENGTH.pack(len(message)) + message)

    def push(self, more: bytes = b"") -> None:
        """Sends what the kernel takes now. Raises OSError."""
        self._out += more
        try:
            self._out = self._out[self.socket.send(self._out) :] if self._out else b""
        except (BlockingIOError, InterruptedError):
            return


class Heartbeats:
    """This node's connections to the others of a job."""

    def __init__(self, node: int, token: str, listener: socket.socket, addresses: Sequence[Address | None]) -> None:
        """`addresses`: of all nodes, in their order; None has nobody to talk to."""
        self.node, self._token = node, token.encode()
        self._hello = _HELLO.pack(_MAGIC, self._token, node)
        self._lines: dict[int, _Line] = {}
        self._strangers: list[_Line] = []
        self._addresses = dict(enumerate(addresses))
        self._connecting = {other: 0.0 for other in self._addresses if other > node and self._addresses[other]}
        self._greeted: set[int] = set()
        self.gone: set[int] = set()  # their connections have ended
        self._listener = listener
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)

    def turn(self) -> dict[int, bytes]:
        """The newest message of each node that has sent one since. Waits for nothing."""
        self._connect()
        heard: dict[int, bytes] = {}
        for key, _ in self._selector.select(0):
            if key.data is None:
                self._accept()
            else:
                self._serve(key.data, heard)
        for line in [*self._strangers]:
            if time.monotonic() - line.began > _STRANGER_S:
                self._close(line)
            else:
                self._push(line)
        return heard

    def unconnected(self) -> list[int]:
        """Nodes that have somebody to talk to, and have never done so."""
        there = [node for node, address in self._addresses.items() if address is not None and node != self.node]
        return [node for node in there if node not in self._greeted and node not in self.gone]

    def send(self, message: bytes) -> None:
        """To all nodes that are connected."""
        for line in [*self._lines.values()]:
            self._push(line, message)

    def _push(self, line: _Line, message: bytes | None = None) -> None:
        try:
            line.push() if message is None else line.send(message)
        except OSError as error:
            self._end(line, error)

    def _connect(self) -> None:
        for other, again in [*self._connecting.items()]:
            if time.monotonic() < again:
                continue
            self._connecting[other] = time.monotonic() + _AGAIN_S
            address = self._addresses[other]
            assert address is not None
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            connection = socket.socket(family)
            connection.setblocking(False)
            if connection.connect_ex(address) in (0, errno.EINPROGRESS):
                self._begin(connection, self._hello)
            else:
                connection.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # who has called has left again
            return
        connection.setblocking(False)
        self._begin(connection)

    def _begin(self, connection: socket.socket, first: bytes = b"") -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = _Line(connection, first)
        self._strangers.append(line)
        self._selector.register(connection, selectors.EVENT_READ, line)
        if len(self._strangers) > _STRANGERS:
            self._close(self._strangers[0])

    def _serve(self, line: _Line, heard: dict[int, bytes]) -> None:
        try:
            line.fill()
            if line.node < 0 and not self._greets(line):
                return
            while (message := line.message()) is not None:
                heard[line.node] = message
        except (OSError, EOFError, ValueError) as error:
            self._end(line, error)

    def _greets(self, line: _Line) -> bool:
        """Whether it has said by now who it is."""
        hello = line.take(_HELLO.size)
        if hello is None:
            return False
        magic, token, node = _HELLO.unpack(hello)
        known = magic == _MAGIC and hmac.compare_digest(token, self._token)
        if not known or node == self.node or node not in self._addresses or node in self._greeted:
            self._close(line)
            return False
        line.node = node
        self._strangers.remove(line)
        self._lines[node] = line
        self._greeted.add(node)
        if self._connecting.pop(node, None) is None:
            line.push(self._hello)
        return True

    def _end(self, line: _Line, error: Exception) -> None:
        if line.node >= 0 and (isinstance(error, EOFError) or getattr(error, "errno", None) in _ENDED):
            self.gone.add(line.node)
        self._close(line)

    def _close(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        line.socket.close()
        if line in self._strangers:
            self._strangers.remove(line)
        if self._lines.get(line.node) is line:
            del self._lines[line.node]
