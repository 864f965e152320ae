//! Turns: connections of a worker share one thread, so each stops after some work to let the others go on.

use std::pin::pin;
use std::task::{Context, Poll};

use tokio::task::yield_now;

/// Ends the turn of a task that has more to do: returns `Pending`, and the task is polled again after the runtime has
/// looked for new connections and requests.
///
/// A task that wakes itself instead, by its waker, is polled again at once. The runtime then looks for new requests only
/// every so many turns, and if no other task is ready, all of them are those of this task: a single streamed key made
/// other requests wait for 20 chunks.
pub(crate) fn poll_end_turn<T>(cx: &mut Context<'_>) -> Poll<T> {
    // The first poll hands the waker to the runtime. It is always pending.
    let _ = pin!(yield_now()).poll(cx);
    Poll::Pending
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::AsyncReadExt;
    use tokio::net::UnixStream;

    use super::*;

    #[tokio::test]
    async fn new_input_is_noticed_after_one_turn() {
        let (theirs, mut ours) = UnixStream::pair().unwrap();
        let mut reading = tokio::spawn(async move { ours.read_u8().await });
        let mut turns = 0;
        // Spawned, because the runtime treats the future of a test unlike that of a connection.
        let working = tokio::spawn(poll_fn(move |cx| {
            turns += 1;
            if turns == 1 {
                theirs.try_write(&[1]).unwrap();
            }
            match pin!(&mut reading).poll(cx) {
                Poll::Ready(_) => Poll::Ready(turns),
                Poll::Pending => poll_end_turn(cx),
            }
        }));
        let turns = working.await.unwrap();
        assert!(turns <= 4, "{turns} turns");
    }
}
