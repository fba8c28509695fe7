"""Worlds that a population's members talk to: a score comes out of a whole conversation.

    class Parrot(World):
        def reset(self, row):                       # what the model reads first
            self.word = row["word"]
            return f"Say {self.word}."

        def step(self, completion):                 # what it reads next, whether it is over, a score
            return Turn(done=True, score=float(self.word in completion))

Classes for TRL's ``environment_factory``, and functions for its ``tools``, are taken as they are
(:mod:`eggroll.llm.worlds.environments`).
"""
