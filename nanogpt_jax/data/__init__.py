"""The data room: text to tokens on disk (`dataset.open_data`), and tokens to batches (`batches`)."""
