"""The chunks that an `LLM` keeps: computed once, found by their content."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanobraid._compose import encode_content
from nanobraid._driver import Call, Driver
from nanobraid.composition import Content
from nanobraid.errors import InvalidArgumentError, error_of
from nanobraid.tokenizer import Tokenizer

#: Tokens of a block of keys and values.
BLOCK_TOKENS = 16


@dataclass(frozen=True)
class ChunkInfo:
    """A chunk that is kept.

    Attributes:
        id: Names it in this `LLM`; never used again for another one.
        token_ids: Its tokens.
        anchor_token_ids: What stood before them while they were computed.
        ready: Whether its keys and values are stored; if not, they are being computed.
        pinned: It stays until it is removed or unpinned.
        users: Requests that use it now.
        hits: How often a request has found it.
        kv_bytes: Memory its keys and values take.
        shared_bytes: Of them, what chunks before it in the list have too: those that begin with the same tokens.
    """

    id: int
    token_ids: list[int]
    anchor_token_ids: list[int]
    ready: bool
    pinned: bool
    users: int
    hits: int
    kv_bytes: int
    shared_bytes: int


class ChunkCache:
    """Chunks of an `LLM`. They belong to the namespace of their `cache_salt`, in which alone they are found.

    Nothing here need be called before `LLM.compose`, which computes what is missing. Any thread may call anything.
    """

    def __init__(self, driver: Driver, tokenizer: Tokenizer) -> None:
        self._driver = driver
        self._tokenizer = tokenizer

    def compute(
        self, contents: Sequence[Content], *, anchor: Sequence[int] = (), pin: bool = False, cache_salt: str = ""
    ) -> list[int]:
        """Computes chunks that are not there yet, all in one batch.

        Args:
            contents: A list of texts or of token id lists.
            anchor: For all of them, see `Segment`.
            pin: They stay until they are removed or unpinned. Otherwise they go, the one not used for longest first,
                when others need the room.
            cache_salt: Their namespace.

        Returns:
            Their ids, in order.

        Raises:
            InvalidArgumentError: There are none, or one is empty, too long or neither text nor token ids.
            OutOfMemoryError: There is no room beside chunks that are pinned or in use.
        """
        ids, anchor_ids = self._checked(contents, anchor)
        call = Call(streams=False)
        try:
            self._submit(call, ids, anchor_ids, pin=pin, cache_salt=cache_salt)
            return self._wait(call, ids, anchor_ids, cache_salt)
        except BaseException:
            self._driver.cancel(call)
            raise

    def _checked(self, contents: Sequence[Content], anchor: Sequence[int]) -> tuple[list[list[int]], list[int]]:
        if isinstance(contents, str) or not isinstance(contents, Sequence) or not contents:
            raise InvalidArgumentError("contents must be a list of texts or of token id lists, with at least one")
        ids = [encode_content(self._tokenizer, content, f"contents[{i}]") for i, content in enumerate(contents)]
        return ids, self._tokenizer.check_token_ids(anchor, "anchor")

    def _submit(self, call: Call, ids: list[list[int]], anchor_ids: list[int], *, pin: bool, cache_salt: str) -> None:
        with self._driver.together():
            for i, own in enumerate(ids):
                self._driver.compute_chunk(call, i, own, anchor_ids, pin=pin, cache_salt=cache_salt)

    def _wait(self, call: Call, ids: list[list[int]], anchor_ids: list[int], cache_salt: str) -> list[int]:
        while outputs := self._driver.wait(call):
            for _, output in outputs:
                if output.finish_reason == "error" and output.error is not None:
                    raise error_of(*output.error)
        return [self._driver.find_chunk(own, anchor_ids, cache_salt) for own in ids]

    def find(self, content: Content, *, anchor: Sequence[int] = (), cache_salt: str = "") -> int | None:
        """The id of a chunk that is there or being computed; None if there is none.

        Raises:
            InvalidArgumentError: The content is empty, or neither text nor token ids.
        """
        own = encode_content(self._tokenizer, content, "content")
        anchor_ids = self._tokenizer.check_token_ids(anchor, "anchor")
        return self._driver.find_chunk(own, anchor_ids, cache_salt) or None

    def bytes_for(self, num_tokens: int) -> int:
        """Memory of the keys and values of so many tokens, in whole blocks."""
        return -(-num_tokens // BLOCK_TOKENS) * self._driver.block_bytes()

    def cached_prefix(self, token_ids: Sequence[int], *, cache_salt: str = "") -> int:
        """How many of the first tokens of a prompt the prefix cache could give now.

        Raises:
            InvalidArgumentError: They are not token ids of the vocabulary.
        """
        return self._driver.num_cached(self._tokenizer.check_token_ids(token_ids), cache_salt)

    def list(self, *, cache_salt: str = "") -> list[ChunkInfo]:
        """The chunks of a namespace, oldest first."""
        block_bytes = self._driver.block_bytes()
        return [
            ChunkInfo(
                id=item["id"],
                token_ids=item["token_ids"],
                anchor_token_ids=item["anchor_token_ids"],
                ready=item["ready"],
                pinned=item["pinned"],
                users=item["users"],
                hits=item["hits"],
                kv_bytes=item["blocks"] * block_bytes,
                shared_bytes=item["shared_blocks"] * block_bytes,
            )
            for item in self._driver.list_chunks(cache_salt)
        ]

    def remove(self, chunk_id: int) -> bool:
        """Gives the memory of a chunk back, once nobody uses it any more. False if there is no such chunk."""
        return self._driver.remove_chunk(chunk_id)

    def pin(self, chunk_id: int, pinned: bool = True) -> bool:
        """Keeps a chunk until it is removed or unpinned. False if there is no such chunk."""
        return self._driver.pin_chunk(chunk_id, pinned)
