from concurrent.futures import ThreadPoolExecutor

from moe_train.machine.progress import counted, listening


def test_whoever_listens_hears_of_the_beginning_and_of_every_part() -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *told: heard.append(told)):
        done = counted("writing", 100)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(done, [10] * 10))
    assert heard == [("writing", count, 100) for count in range(0, 110, 10)]


def test_nobody_need_listen() -> None:
    with listening(lambda *told: None):
        pass
    counted("writing", 3)(3)
