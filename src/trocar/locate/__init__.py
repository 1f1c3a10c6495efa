"""Floor 3: which components matter. Every locate routine returns `Scores`."""

from trocar.locate.scores import How, Matrix, Scores, iou, mean

__all__ = ["How", "Matrix", "Scores", "iou", "mean"]
