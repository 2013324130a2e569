"""The token trie: every distinct prefix of a batch of sequences is computed once."""

from selfevo.trie.attention import TreeContext
from selfevo.trie.packing import pack
from selfevo.trie.trie import TokenTrie, build_trie

__all__ = ["TokenTrie", "TreeContext", "build_trie", "pack"]
