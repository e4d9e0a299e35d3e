"""Problems, traces and annotations: records and their files, and the reader of labelled chains."""
