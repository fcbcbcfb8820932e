//! diesel, through diesel-async.

use anyhow::Result;
use diesel::mysql::Mysql;
use diesel::sql_types::{BigInt, Blob, Nullable, Text};
use diesel::{ExpressionMethods, sql_query};
use diesel_async::{
    AnsiTransactionManager, AsyncConnection, AsyncMysqlConnection, RunQueryDsl, TransactionManager,
};
use outbox_mysql::{MySqlSchema, SqlValue};

use super::order_placed;

diesel::table! {
    orm_orders (id) {
        id -> Text,
        state -> Text,
    }
}

pub async fn place_orders(url: &str, schema: &MySqlSchema) -> Result<()> {
    let mut connection = AsyncMysqlConnection::establish(url).await?;
    AnsiTransactionManager::begin_transaction(&mut connection).await?;
    place(&mut connection, schema, "diesel-1").await?;
    AnsiTransactionManager::commit_transaction(&mut connection).await?;
    AnsiTransactionManager::begin_transaction(&mut connection).await?;
    place(&mut connection, schema, "diesel-rolled-back").await?;
    AnsiTransactionManager::rollback_transaction(&mut connection).await?;
    Ok(())
}

/// Nothing here can tell whether a transaction is open: outside of one, the order and the message
/// would be committed one by one.
async fn place(tx: &mut AsyncMysqlConnection, schema: &MySqlSchema, order: &str) -> Result<()> {
    let values = (orm_orders::id.eq(order), orm_orders::state.eq("placed"));
    diesel::insert_into(orm_orders::table).values(values).execute(tx).await?;
    let insert = order_placed(schema, order)?;
    let mut query = sql_query(insert.sql()).into_boxed::<Mysql>();
    for value in insert.values() {
        query = match value {
            SqlValue::Null => query.bind::<Nullable<Blob>, _>(None::<Vec<u8>>),
            SqlValue::Int(number) => query.bind::<BigInt, _>(*number),
            SqlValue::Text(text) => query.bind::<Text, _>(text.clone()),
            SqlValue::Bytes(bytes) => query.bind::<Blob, _>(bytes.clone()),
        };
    }
    query.execute(tx).await?;
    Ok(())
}
