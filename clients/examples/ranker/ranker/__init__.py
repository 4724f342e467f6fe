"""A ranking service as users of an embedding store write it: vectors from the store, a small model of its own.

    POST /rank {user, 500 candidates} -> one lookup of both tables, of the release the model was trained with
                                      -> scores -> the best 20

`service.py` answers, `remote.py` fetches, `model.py` scores. `train.py` makes the artifact that pins the release,
`evaluate.py` measures the running service against the figure that training found.
"""
