"""The first minutes on a card: steps by worth, each in a process of its own, and predictions beside what they measured."""
