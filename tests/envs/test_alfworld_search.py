"""Where an expert looks that knows no more than the observations of an ALFWorld game: without the game."""

from trl_epo.envs.alfworld.search import Search, plan_after


FIRST = (
    "You are in the middle of a room. Looking quickly around you, you see a cabinet 2, a cabinet 1, and a desk 1.\n\n"
    "Your task is to: put a mug in desk."
)
PLAN = ["go to cabinet 1", "open cabinet 1", "take mug 1 from cabinet 1", "go to desk 1", "move mug 1 to desk 1"]


def test_place_by_place_until_it_is_seen():
    search = Search(FIRST)
    assert search.next(PLAN, ()) == "go to cabinet 2"
    search.note("go to cabinet 2", "You arrive at cabinet 2. The cabinet 2 is closed.")
    assert search.next(PLAN, ["open cabinet 2"]) == "open cabinet 2"
    search.note("open cabinet 2", "You open the cabinet 2. The cabinet 2 is open. In it, you see a pen 1.")
    assert search.next(PLAN, ["close cabinet 2", "take pen 1 from cabinet 2"]) == "go to cabinet 1"
    search.note(
        "go to cabinet 1", "You arrive at cabinet 1. The cabinet 1 is open. In it, you see a egg 1, and a mug 1."
    )
    assert search.next(PLAN, ()) is None


def test_another_of_the_kind_does_as_well():
    search = Search(FIRST)
    search.note("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 2.")
    assert search.next(PLAN, ["take mug 2 from desk 1"]) == "take mug 2 from desk 1"
    search.note("go to cabinet 2", "You arrive at cabinet 2. The cabinet 2 is closed.")
    assert search.next(PLAN, ["open cabinet 2"]) == "go to desk 1"


def test_what_was_brought_is_left_there():
    search = Search(FIRST)
    search.note("go to cabinet 2", "You arrive at cabinet 2. In it, you see a mug 2.")
    search.note("take mug 2 from cabinet 2", "You pick up the mug 2 from the cabinet 2.")
    search.note("go to desk 1", "You arrive at desk 1. On the desk 1, you see nothing.")
    search.note("move mug 2 to desk 1", "You move the mug 2 to the desk 1.")
    search.note("go to desk 1", "You arrive at desk 1. On the desk 1, you see a mug 2.")
    assert search.next(PLAN, ["take mug 2 from desk 1"]) == "go to cabinet 1"
    search.note("go to cabinet 1", "You arrive at cabinet 1. In it, you see nothing.")
    assert search.next(PLAN, ["take mug 2 from desk 1"]) is None  # there is none: whoever planned may go on


def test_what_the_plan_does_before_is_done_first():
    search = Search(FIRST)
    search.note("go to desk 1", "You arrive at desk 1. On the desk 1, you see a pen 1.")
    plan = ["take pen 1 from desk 1", "go to cabinet 1", "take mug 1 from cabinet 1"]
    assert search.next(plan, ()) is None
    assert search.next(plan[1:], ()) == "go to cabinet 2"


def test_what_changes_a_plan():
    assert plan_after(PLAN, PLAN[0]) == PLAN[1:]
    for command in ("go to desk 1", "open cabinet 2", "close cabinet 2", "examine pen 1", "look", "inventory"):
        assert plan_after(PLAN, command) == PLAN
    for command in ("take pen 1 from desk 1", "move pen 1 to desk 1", "heat egg 1 with microwave 1", "use desklamp 1"):
        assert plan_after(PLAN, command) == []
