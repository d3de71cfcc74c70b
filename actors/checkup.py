"""Does a run find a Ray here? For `async-rlhf doctor`, in a process of its own."""

from actors.session import open_session
from async_rlhf.config import Config


def look_at_ray() -> str:
    """Start a Ray, or join the one at RAY_ADDRESS, as a run would; then leave it.

    Returns:
        Its nodes and what they offer.
    Raises:
        RunError: there is none at RAY_ADDRESS.
    """
    session = open_session()
    import ray  # it reads the session's token now

    from actors.launch import connect

    cluster = connect(Config(), "doctor", session)
    try:
        assert ray.get(ray.put(1)) == 1, "the object store gives back something else"
        alive = [node for node in ray.nodes() if node["Alive"]]
        total = ray.cluster_resources()
        where = "started one here" if session is not None else f"joined {cluster.address}"
        store_gib = total.get("object_store_memory", 0) / 2**30
        offers = f"{total.get('CPU', 0):g} CPU, {total.get('GPU', 0):g} GPU, {store_gib:.1f} GiB of object store"
        return f"{ray.__version__}, {where}: {len(alive)} node(s), {offers}"
    finally:
        cluster.close()
