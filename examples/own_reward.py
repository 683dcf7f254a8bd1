"""A reward of your own: `treepo train configs/dataset.yaml task.reward=examples.own_reward:concise ...`.

It runs in a worker process with a time limit. If it raises, hangs or returns NaN, its leaf is left out of training.
"""

from treepo.tasks.math import boxed, equivalent


def concise(prompt: str, response: str, answer: str) -> float:  # noqa: ARG001
    """0 for a wrong answer; for a right one 1, minus up to 0.1 for the length of the response."""
    given = boxed(response)
    if given is None or not equivalent(answer, given):
        return 0.0
    return 1.0 - min(len(response), 4000) / 40000


if __name__ == "__main__":
    print(concise(prompt="What is 1/2 + 1/4?", response=r"Quarters: 2 + 1 = 3. \boxed{\frac{3}{4}}", answer="0.75"))
