"""The tree's invariants, and rollouts on disk."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.random_trees import grow_random, rollout_of
from treepo.errors import TaskError
from treepo.tree import ROOT, ScoredTree, Stop, Tree, append_tree, read_trees, write_trees

seeds = st.integers(0, 10_000)


def paths(tree: Tree) -> dict[int, tuple[list[int], list[float], list[float]]]:
    """Tokens, log-probs and entropies of every leaf, found the slow way: up through the parents."""
    found = {}
    for leaf in tree.leaves():
        tokens: list[int] = []
        logprobs: list[float] = []
        entropies: list[float] = []
        node = leaf
        while node != -1:
            tokens = tree.nodes[node].tokens + tokens
            logprobs = tree.nodes[node].logprobs + logprobs
            entropies = (tree.nodes[node].entropies or []) + entropies
            node = tree.nodes[node].parent
        found[leaf] = (tokens, logprobs, entropies)
    return found


def hand_drawn() -> Tree:
    """Prompt 1 2; child a = 3 4 5 with leaves 6 and 7 8; child b = 9, a leaf."""
    tree = Tree([1, 2], key="q")
    a = tree.add(ROOT, [3, 4, 5], [-0.1, -0.2, -0.3], seed=1)
    tree.add(a, [6], [-0.4], seed=2, stop=Stop.EOS)
    tree.add(a, [7, 8], [-0.5, -0.6], seed=3, stop=Stop.ANSWER)
    tree.add(ROOT, [9], [-0.7], seed=4, stop=Stop.LENGTH)
    return tree


@given(seeds)
def test_a_childs_prefix_is_its_paths_tokens(seed: int) -> None:
    tree = grow_random(seed)
    for node in range(1, len(tree)):
        parent = tree.nodes[node].parent
        assert tree.tokens(node) == tree.tokens(parent) + tree.nodes[node].tokens
        assert tree.nodes[node].start == len(tree.tokens(parent))
        assert tree.response(node) == tree.tokens(node)[len(tree.prompt) :]
        assert tree.response_length(node) == len(tree.response(node))


@given(seeds)
def test_a_node_has_children_or_is_finished_never_both(seed: int) -> None:
    tree = grow_random(seed)
    for node, children in zip(tree.nodes, tree.children, strict=True):
        assert bool(children) == (node.stop is None)


@given(seeds, st.data())
def test_cutting_anywhere_keeps_every_paths_tokens(seed: int, data: st.DataObject) -> None:
    tree = grow_random(seed, splits=0)
    before = paths(tree)
    for _ in range(4):
        leaf = data.draw(st.sampled_from(tree.leaves()))
        kept = data.draw(st.integers(0, tree.response_length(leaf)))
        node = tree.node_after(leaf, kept)
        assert tree.tokens(node) == before[leaf][0][: len(tree.prompt) + kept]
        assert node in tree.path(leaf)
    assert paths(tree) == before
    assert Tree.from_json(tree.to_json()) == tree


def test_cutting_at_an_existing_boundary_makes_no_node() -> None:
    tree = hand_drawn()
    assert tree.node_after(3, 3) == 1 and tree.node_after(3, 0) == ROOT and tree.node_after(3, 5) == 3
    assert len(tree) == 5


def test_the_halves_of_a_split_share_seed_and_depth_and_the_leaf_keeps_its_index() -> None:
    tree = hand_drawn()
    head = tree.split(3, 1)
    assert tree.nodes[head].tokens == [7] and tree.nodes[3].tokens == [8] and tree.nodes[3].stop is Stop.ANSWER
    assert tree.nodes[head].seed == tree.nodes[3].seed and tree.nodes[head].depth == tree.nodes[3].depth == 2
    assert tree.children[1] == [2, head] and tree.children[head] == [3]


def test_sharing_counts_each_token_once_or_once_per_leaf() -> None:
    tree = hand_drawn()
    assert tree.unique_tokens == 3 + 1 + 2 + 1
    assert tree.flat_tokens == 4 + 5 + 1


@given(seeds)
def test_json_round_trips_bit_for_bit(seed: int) -> None:
    tree = grow_random(seed)
    text = json.dumps(tree.to_json())
    again = Tree.from_json(json.loads(text))
    assert again == tree and json.dumps(again.to_json()) == text


@pytest.mark.parametrize(
    ("rewards", "spread"),
    [([1.0, 0.0, 1.0], True), ([1.0, 1.0, 1.0], False), ([1.0, None, 0.0], True), ([1.0, None, 1.0], False)],
)
def test_a_reward_that_is_not_known_is_no_spread(rewards: list[float | None], *, spread: bool) -> None:
    assert ScoredTree("a", hand_drawn(), rewards).has_spread is spread


@pytest.mark.parametrize("name", ["trees.jsonl", "trees.jsonl.gz"])
def test_rollout_files_round_trip_and_equal_rollouts_make_equal_files(tmp_path, name: str) -> None:
    rollouts = [rollout_of(grow_random(seed), seed, unscored=0.2) for seed in range(5)]
    rollouts.append(ScoredTree("e", hand_drawn(), [1.0, None, 0.0], {3: "reward timed out after 5 s"}))
    write_trees(tmp_path / name, rollouts)
    assert list(read_trees(tmp_path / name)) == rollouts
    first = (tmp_path / name).read_bytes()
    write_trees(tmp_path / name, rollouts)
    assert (tmp_path / name).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["trees.jsonl", "trees.jsonl.gz"])
def test_rollouts_that_are_added_one_by_one_are_all_in_the_file_at_any_time(tmp_path, name: str) -> None:
    rollouts = [rollout_of(grow_random(seed), seed, unscored=0.2) for seed in range(5)]
    for count, rollout in enumerate(rollouts, 1):
        append_tree(tmp_path / name, rollout)
        assert list(read_trees(tmp_path / name)) == rollouts[:count]
    written = gzip.decompress if name.endswith(".gz") else bytes
    write_trees(tmp_path / "whole.jsonl", rollouts)
    assert written((tmp_path / name).read_bytes()) == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda row: row["tree"].update(schema=99), "schema 99"),
        (lambda row: row["tree"]["nodes"].pop(), "do not describe one tree"),
        (lambda row: row["tree"]["nodes"][3].update(parent=2), "names parent 2"),
        (lambda row: row["tree"]["nodes"][3].update(stop=None), "have either children or a stop"),
        (lambda row: row["tree"]["nodes"][3].update(stop="bored"), "bored"),
        (lambda row: row["tree"]["nodes"][3].update(entropies=[0.5]), "2 tokens and 1 entropies"),
        (lambda row: row.pop("rewards"), "rewards"),
        (lambda row: row["rewards"].pop(), "2 rewards for 3 leaves"),
    ],
)
def test_a_damaged_file_names_file_and_line(tmp_path, damage, message: str) -> None:
    path = tmp_path / "trees.jsonl"
    write_trees(path, [ScoredTree("a", hand_drawn(), [1.0, 0.0, 0.0])] * 2)
    good, row = path.read_text().splitlines()[0], json.loads(path.read_text().splitlines()[1])
    damage(row)
    path.write_text(good + "\n" + json.dumps(row) + "\n")
    with pytest.raises(TaskError, match=rf"trees.jsonl:2: not a scored tree: .*{message}"):
        list(read_trees(path))


def test_misuse_is_refused() -> None:
    tree = hand_drawn()
    with pytest.raises(ValueError, match="is a leaf"):
        tree.add(4, [1], [0.0], seed=9)
    with pytest.raises(ValueError, match="at least one token"):
        tree.add(1, [], [], seed=9)
    with pytest.raises(ValueError, match="1 tokens came with 2"):
        tree.add(1, [1], [0.0, 0.0], seed=9)
    with pytest.raises(ValueError, match="1 tokens came with 2 entropies"):
        tree.add(1, [1], [0.0], seed=9, entropies=[0.0, 0.0])
    with pytest.raises(ValueError, match="cannot split"):
        tree.split(4, 1)
    with pytest.raises(ValueError, match="finished already"):
        tree.finish(1, Stop.EOS)
    with pytest.raises(ValueError, match="cannot keep 6 of 5"):
        tree.node_after(3, 6)
    with pytest.raises(ValueError, match="prompt of at least one token"):
        Tree([])


def tool_tree() -> Tree:
    tree = Tree([1, 2], key="k")
    call = tree.add(0, [3, 4], [-0.5, -1.0], seed=1)
    output = tree.add(call, [5, 6, 7], [], seed=2, sampled=False)
    tree.add(output, [8], [-0.1], seed=3, stop=Stop.EOS)
    tree.add(output, [], [], seed=4, stop=Stop.ERROR, error="the server is down")
    return tree


def test_tokens_that_were_not_sampled_and_errors_round_trip_and_survive_a_split(tmp_path: Path) -> None:
    tree = tool_tree()
    tree.split(2, 1)
    halves = [node for node in tree.nodes if not node.sampled]
    assert [node.tokens for node in halves] == [[6, 7], [5]] and not any(node.logprobs for node in halves)
    write_trees(tmp_path / "t.jsonl", [ScoredTree("p", tree, [1.0, None])])
    (again,) = read_trees(tmp_path / "t.jsonl")
    assert again.tree == tree
    assert [node.error for node in again.tree.nodes if node.stop is Stop.ERROR] == ["the server is down"]


def test_what_the_policy_did_not_sample_has_no_log_probs_and_only_failed_leaves_an_error() -> None:
    tree = tool_tree()
    with pytest.raises(ValueError, match="not sampled"):
        tree.add(1, [9], [-0.1], seed=5, sampled=False)
    with pytest.raises(ValueError, match="log-probs"):
        tree.add(1, [9], [], seed=5)
    with pytest.raises(ValueError, match="error"):
        tree.add(1, [9], [-0.1], seed=5, error="no reason")
    value = tree.to_json()
    value["nodes"][2]["logprobs"] = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="log-probs"):
        Tree.from_json(value)
