"""The data room: text to tokens on disk (`prepare.open_data`), and tokens to batches (`batches`)."""
