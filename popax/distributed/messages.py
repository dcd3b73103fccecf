"""What is said when a process is lost."""


def lost_message(who: str, why: str) -> str:
    """Who is lost, how it showed, and what to do."""
    return (
        f"{who} of this run is lost ({why}): no process can go on alone, so all end. Nothing is half-written; see the "
        "lost process's log, then start all processes again with the same command: the run goes on from its "
        "checkpoint"
    )
