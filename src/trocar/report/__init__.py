"""Floor 6: a run folder as pictures and HTML, from the folder alone. What a run folder holds is `trocar.result`."""
